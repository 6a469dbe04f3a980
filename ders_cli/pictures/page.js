// Unpacks the plotting library and the figures that stand in this page, and draws them. Nothing is fetched from anywhere.
"use strict";

const LOOK = {
  paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)",
  font: { family: "system-ui, Segoe UI, Roboto, sans-serif", size: 12.5, color: "#777777" },
  margin: { l: 66, r: 16, t: 26, b: 58 },
  hoverlabel: { bgcolor: "#20252c", bordercolor: "#20252c", font: { color: "#ffffff" } },
  modebar: { bgcolor: "rgba(0,0,0,0)", color: "#8a929c", activecolor: "#4477aa" },
};
const AXIS = {
  exponentformat: "power",
  gridcolor: "rgba(128,128,128,0.22)",
  zerolinecolor: "rgba(128,128,128,0.4)",
  linecolor: "rgba(128,128,128,0.6)",
  automargin: true,
};
// plotly's own buttons include one that uploads the chart to a server of theirs: only these four are offered.
const CONFIG = {
  responsive: true,
  displaylogo: false,
  showSendToCloud: false,
  plotlyServerURL: "",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
const ARRAYS = { f4: Float32Array, u1: Uint8Array };

async function unpacked(id) {
  const text = atob(document.getElementById(id).textContent.trim());
  const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// {"$": [type, first byte, rows, columns], low, high}: numbers that stand behind the JSON; rows -1: a list, not a table.
function revived(value, buffer, origin) {
  if (Array.isArray(value)) return value.map((item) => revived(item, buffer, origin));
  if (value === null || typeof value !== "object") return value;
  if (!value.$) return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, revived(item, buffer, origin)]));
  const [type, first, rows, columns] = value.$;
  let cells = new ARRAYS[type](buffer, origin + first, Math.abs(rows) * columns);
  if (type === "u1") {  // 255 is no number; the others are steps from low to high
    const step = (value.high - value.low) / 254;
    cells = Float32Array.from(cells, (code) => (code === 255 ? NaN : value.low + step * code));
  }
  if (rows < 0) return cells;
  return Array.from({ length: rows }, (_, row) => cells.subarray(row * columns, (row + 1) * columns));
}

// The names of what a picture's numbers stand for, as the text of its cells.
function named(trace) {
  const names = trace.meta && trace.meta.names;
  if (names) trace.text = trace.z.map((row) => Array.from(row, (code) => names[Math.round(code)] || ""));
  return trace;
}

function layoutOf(option) {
  const layout = { ...LOOK, ...option.layout };
  for (const axis of ["xaxis", "yaxis", ...Object.keys(layout).filter((key) => /^[xy]axis/.test(key))]) {
    layout[axis] = { ...AXIS, ...option.layout[axis] };
    if (layout[axis].title) layout[axis].title = { standoff: 10, ...layout[axis].title };
  }
  return layout;
}

function draw(figure, option) {
  const place = document.getElementById("plot-" + figure.key);
  place.style.height = option.layout.height + "px";
  return Plotly.react(place, option.data.map(named), layoutOf(option), CONFIG);
}

// One selector for each part of the options' names; the option with all chosen parts is drawn, or the nearest there is.
function selectors(figure) {
  const place = document.getElementById("choose-" + figure.key);
  const chosen = figure.options[0].name.slice();
  figure.selectors.forEach((title, part) => {
    const select = document.createElement("select");
    for (const name of new Set(figure.options.map((option) => option.name[part]))) select.append(new Option(name, name));
    select.addEventListener("change", () => {
      chosen[part] = select.value;
      const likeness = (option) => option.name.filter((name, i) => name === chosen[i]).length;
      const fitting = figure.options.filter((option) => option.name[part] === select.value);
      const option = fitting.reduce((best, other) => (likeness(other) > likeness(best) ? other : best));
      option.name.forEach((name, i) => { chosen[i] = name; place.querySelectorAll("select")[i].value = name; });
      draw(figure, option);
    });
    const label = document.createElement("label");
    label.append(title + " ", select);
    place.append(label);
  });
}

async function main() {
  const [library, figures] = await Promise.all([unpacked("library"), unpacked("figures")]);
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(library);
  document.head.append(script);
  const length = new DataView(figures).getUint32(0, true);
  const list = revived(JSON.parse(new TextDecoder().decode(new Uint8Array(figures, 4, length))), figures, 4 + length);
  for (const figure of list) {
    selectors(figure);
    await draw(figure, figure.options[0]);
    performance.mark("figure");
    await new Promise((next) => setTimeout(next));  // what is drawn is shown, and the page can be scrolled
  }
  const width = document.querySelector("main").clientWidth - 40;  // A4 less its margins of 14 mm has 688 px
  document.documentElement.style.setProperty("--print", Math.min(1, 680 / width).toFixed(3));
  performance.mark("drawn");
  document.documentElement.dataset.drawn = list.length;
}

main().catch((error) => {
  const place = document.getElementById("trouble");
  place.style.display = "block";
  place.textContent = "The figures cannot be drawn in this browser: " + error.message + ". The tables below are whole.";
  throw error;
});
