"""A report as one picture for a paper: PNG, PDF or SVG by the file's ending, drawn by matplotlib.

The panels are those of the page that fit on paper: the plan, bytes, size against error, and the delta layer by layer. The same
report gives the same bytes: no time and no random names are written.
"""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.manifest import write_file
from ..errors import UsageError
from ..report import finite, human_bytes, visible
from . import colours
from .quantities import QUANTITIES, terms_by_size
from .sizes import BITS, family
from .tables import Axes, axes, per_expert, per_layer

if TYPE_CHECKING:  # an extra
    from matplotlib.axes import Axes as Panel

ENDINGS = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    ".svg": {"Date": None},
}
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "ders"}
MOST_NAMES = 24  # codecs that are written at their points


def write_plot(document: dict[str, Any], path: Path) -> None:
    """A report (docs/report-schema.json) as PNG, PDF or SVG. Raises UsageError for another ending, or without matplotlib."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--plot {path}: expected a name that ends in .png, .pdf or .svg")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'ders-cli[report]'") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 8), dpi=160, layout="constrained")
        panels = figure.subplots(2, 2).flat
        document = finite(document)
        for draw, panel in zip(_panels(document), panels, strict=True):
            draw(document, panel)
        figure.suptitle(_title(document), fontsize=11)
        data = BytesIO()
        figure.savefig(data, format=path.suffix[1:].lower(), metadata=ENDINGS[path.suffix.lower()])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data.getvalue())


def plain(text: str) -> str:
    """A stranger's text for matplotlib, which takes $...$ for mathematics."""
    return visible(text).replace("$", r"\$")


def _panels(document: dict[str, Any]) -> list[Callable[[dict[str, Any], "Panel"], None]]:
    if document["kind"] == "analysis":
        return [_plan, _codecs, _lines, _energy]
    return [_plan, _bytes, _lines, _bits]


def _title(document: dict[str, Any]) -> str:
    name = document["model"]
    name = plain(name if len(name) <= 80 else f"...{name[-77:]}")
    if document["kind"] == "analysis":
        return f"{name}: {document['verdict']['kind']}"
    bits = document["bytes"]["bits_per_delta_weight"]
    return f"{name}: {'-' if bits is None else format(bits, '.3f')} bits per delta weight"


def _plan(document: dict[str, Any], panel: "Panel") -> None:
    """Layers down, experts of gate, up, down across; a colour each codec."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    at, terms = axes(document["groups"]), terms_by_size(document)
    number, chosen = {term: i for i, term in enumerate(terms)}, colours.codec_colours(len(terms))
    arrays = per_expert(at, document["groups"], lambda group: [number[term] for term in group["plan"]])
    if not arrays:
        return
    cells = np.concatenate(list(arrays.values()), axis=1)
    panel.imshow(
        cells, aspect="auto", interpolation="nearest", cmap=ListedColormap(chosen), vmin=-0.5, vmax=len(terms) - 0.5
    )
    width = len(at.columns)
    panel.set_xticks([width * (i + 0.5) - 0.5 for i in range(len(arrays))], [f"{p} experts" for p in arrays])
    for i in range(1, len(arrays)):
        panel.axvline(width * i - 0.5, color="white", linewidth=1.5)
    _layer_ticks(panel.yaxis, at)
    panel.set(title="Plan", ylabel="layer")
    names = [Patch(color=colour, label=plain(term)) for colour, term in zip(chosen, terms)][:12]
    panel.legend(handles=names, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=7)


def _layer_ticks(axis: Any, at: Axes) -> None:
    rows = np.unique(np.linspace(0, len(at.layers) - 1, min(8, len(at.layers))).astype(int))
    axis.set_ticks(rows, [at.layers[row][:12].replace("$", "") for row in rows])


def _codecs(document: dict[str, Any], panel: "Panel") -> None:
    """Bits against predicted output error, a colour each family; a dotted line for codecs without an error, which has no place here."""
    known = {t: c for t, c in document["codecs"].items() if c["bits_per_delta_weight"] and c["output_error"]}
    families: dict[str, list[str]] = {}
    for term in sorted(known, key=lambda term: known[term]["bits_per_delta_weight"]):
        families.setdefault(family(term), []).append(term)
    for number, (terms, colour) in enumerate(zip(families.values(), colours.codec_colours(max(1, len(families))))):
        beside = (5, (-3, 6, -9)[number % 3])  # points: families lie close together
        bits, errors = zip(*((known[t]["bits_per_delta_weight"], known[t]["output_error"]) for t in terms))
        panel.plot(bits, errors, "o-", color=colour, markersize=4, linewidth=1)
        for term, x, y in zip(terms, bits, errors) if len(known) <= MOST_NAMES else ():
            panel.annotate(plain(term), (x, y), textcoords="offset points", xytext=beside, fontsize=7)
    free = {t: c for t, c in document["codecs"].items() if c["bits_per_delta_weight"] and c["output_error"] == 0}
    for term, codec in free.items() if known else ():
        panel.axvline(codec["bits_per_delta_weight"], color="#999999", linestyle=":")
        at = (codec["bits_per_delta_weight"], 0.02)
        panel.annotate(
            plain(term), at, xycoords=("data", "axes fraction"), textcoords="offset points", xytext=(3, 0), fontsize=7
        )
    if known:
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(BITS, [f"{bits:g}" for bits in BITS])
        panel.minorticks_off()
        bits = [codec["bits_per_delta_weight"] for codec in (known | free).values()]
        panel.set_xlim(min(bits) / 1.5, max(bits) * 2)
    panel.set(title="Predicted size and error", xlabel="bits per delta weight", ylabel="|y' - y| / |y|")


def _lines(document: dict[str, Any], panel: "Panel") -> None:
    """The kind's first quantity, layer by layer: mean over the experts, least to most shaded."""
    at, quantity = axes(document["groups"]), QUANTITIES[document["kind"]][0]
    arrays, rows = per_expert(at, document["groups"], quantity.values), np.arange(len(at.layers))
    for projection, cells in arrays.items():
        known = np.isfinite(cells).any(axis=1)
        if known.any():
            here, colour = cells[known], colours.PROJECTION[projection]
            panel.fill_between(
                rows[known], np.nanmin(here, 1), np.nanmax(here, 1), color=colour, alpha=0.2, linewidth=0
            )
            panel.plot(rows[known], np.nanmean(here, 1), color=colour, label=projection, marker=".", markersize=3)
    _finish(panel, at, quantity.name)


def _finish(panel: "Panel", at: Axes, name: str) -> None:
    _layer_ticks(panel.xaxis, at)
    panel.set(title=f"{name} by layer", xlabel="layer", ylabel=name)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8)


def _energy(document: dict[str, Any], panel: "Panel") -> None:
    """Share of |D|^2 by rank, or by density where no spectra were made: mean over layers, bars of one standard deviation."""
    ranks = any(group["rank_energy"] for group in document["groups"])
    part, axis, name = ("rank_energy", "ranks", "rank") if ranks else ("density_energy", "densities", "density")
    for projection, colour in colours.PROJECTION.items():
        found = [group[part] for group in document["groups"] if group["projection"] == projection and group[part]]
        found = [one for one in found if one[axis] == found[0][axis]]
        if found:
            energies = np.array([one["energy"] for one in found], np.float64)
            known = np.isfinite(energies).any(axis=0)
            x, energies = np.array(found[0][axis], np.float64)[known], energies[:, known]
            mean, bars = np.nanmean(energies, axis=0), np.nanstd(energies, axis=0)
            panel.errorbar(x, mean, bars, color=colour, label=projection, marker=".", capsize=2)
            panel.set_xscale("log")
            panel.set_xticks(x, [f"{value:g}" for value in x])
            panel.minorticks_off()
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=8)
    panel.set(title=f"Energy of the delta by {name}", xlabel=name, ylabel="share of |D|²", ylim=(0, 1.03))


def _bytes(document: dict[str, Any], panel: "Panel") -> None:
    size = document["bytes"]
    bars = {"deltas": size["delta"], "base": size["base"], "experts before": size["experts"]}
    panel.barh(list(bars), list(bars.values()), color=[colours.CODECS[0], colours.CODECS[4], "#999999"])
    for row, count in enumerate(bars.values()):
        panel.text(count, row, f" {human_bytes(count)}", va="center", fontsize=8)
    panel.xaxis.set_major_formatter(lambda count, _: human_bytes(count))
    panel.locator_params(axis="x", nbins=5)
    panel.set(title="Bytes", xlim=(0, 1.25 * max(1, *bars.values())))


def _bits(document: dict[str, Any], panel: "Panel") -> None:
    at, quantity = axes(document["groups"]), QUANTITIES["conversion"][-1]
    arrays = per_layer(at, document["groups"], lambda group: quantity.of(group)[0])
    for projection, values in arrays.items():
        panel.plot(values, color=colours.PROJECTION[projection], label=projection, marker=".", markersize=3)
    _finish(panel, at, quantity.name)
