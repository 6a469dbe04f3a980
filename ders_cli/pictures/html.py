"""One HTML file with everything in it: text, tables, figures, the library that draws them. It needs no network and asks for none.

plotly draws: it is well kept, takes a figure as plain JSON, and has heat maps as images, error bars, hover, zoom and saving as PNG.
(Compressed, its script 4.1 has 1.47 MB; bokeh 3.9's would have 0.35, but its documents are serialised Python models, so that every
figure, and each that a selector chooses, would have to be built with the library.) Script and figures stand
in the page as gzip in base64, which browsers since 2023 unpack by themselves, so a page has about 2 MB. A policy in the
page forbids it every connection. What strangers wrote (names of models, tensors, experts) is escaped as HTML, or stands in base64
and is escaped for plotly (figure.plain).
"""

from html import escape
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.manifest import write_file
from ..errors import UsageError
from ..report import finite, human_bytes, visible
from .figures import Figure, figures
from .pack import Packer, for_page
from .standouts import standouts

EXTRA = "needs plotly: pip install 'ders-cli[report]'"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; base-uri 'none'"
HERE = Path(__file__).parent


def write_html(document: dict[str, Any], path: Path) -> None:
    """A report (docs/report-schema.json) as one page. Raises UsageError where plotly is missing."""
    text = page(finite(document), _library())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


def _library() -> bytes:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UsageError(f"--html {EXTRA}") from None
    return get_plotlyjs().encode()


def page(document: dict[str, Any], library: bytes) -> str:
    """The page's text; `library` is plotly's script."""
    drawn, packer = figures(document), Packer()
    packed = [
        {
            "key": figure.key,
            "selectors": figure.selectors,
            "options": [{"name": o.name, "data": o.data, "layout": o.layout} for o in figure.options],
        }
        for figure in drawn
    ]
    data = packer.whole(packer.packed(packed))
    body = _analysis_text(document) if document["kind"] == "analysis" else _conversion_text(document)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(document["model"])}: {document["kind"]} by ders</title>
<style>{(HERE / "page.css").read_text()}</style>
</head>
<body>
<main>
{body}
<noscript><p>Figures need JavaScript; texts and tables do not.</p></noscript>
<p id="trouble"></p>
{"".join(_figure(figure) for figure in drawn)}
{_tables(document)}
<p class="soft">{_text(document["tool"])}, report schema {document["schema"]}. Drawn by plotly.js (MIT license). This page asks for nothing from the network.</p>
</main>
<script type="text/plain" id="library">{for_page(library)}</script>
<script type="text/plain" id="figures">{for_page(data)}</script>
<script>{(HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def _text(text: Any) -> str:
    """Anything as text of HTML."""
    return escape(visible(str(text)))


def _figure(figure: Figure) -> str:
    chooser = f'<div class="choose" id="choose-{figure.key}"></div>'
    return f"""<section>
<h2>{escape(figure.title)}</h2>
<p class="says">{escape(figure.says)}</p>
{chooser}
<div class="plot" id="plot-{figure.key}"></div>
</section>
"""


def _facts(pairs: list[tuple[str, str]]) -> str:
    return (
        '<ul class="facts">' + "".join(f"<li><b>{_text(b)}</b><span>{_text(a)}</span></li>" for a, b in pairs) + "</ul>"
    )


def _analysis_text(document: dict[str, Any]) -> str:
    verdict, advice, size = document["verdict"], document["recommended"], document["bytes"]
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in verdict["reasons"])
    recipe = f"<pre>{_text_block(advice['recipe'])}</pre>" if advice["recipe"] else ""
    facts = [
        ("architecture", document["architecture"]),
        ("layers with experts", f"{document['layers']:,}"),
        ("experts in a layer", f"{document['experts']:,}"),
        ("stored as", document["dtype"]),
        ("whole folder", human_bytes(size["source"])),
        ("experts", human_bytes(size["experts"])),
        ("base", document["base"]),
        ("inputs", f"{document['states']['tokens']:,} {document['states']['kind']}"),
    ]
    return f"""<h1>{_text(document["model"])}</h1>
<div class="verdict"><strong>{_text(verdict["kind"])}</strong><p>{_text(verdict["says"])}</p><ul>{reasons}</ul></div>
{_facts(facts)}
<h2>Recommended</h2><p>{_text(advice["says"])}</p>{recipe}"""


def _text_block(recipe: dict[str, Any]) -> str:
    """A recipe as YAML, without what is not given; line ends are its own."""
    return "\n".join(_text(line) for line in yaml.safe_dump(_given(recipe), sort_keys=False, width=100).splitlines())


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _conversion_text(document: dict[str, Any]) -> str:
    size = document["bytes"]
    bits, stored = size["bits_per_delta_weight"], size["base"] + size["delta"]
    facts = [
        ("architecture", document["architecture"]),
        ("groups", f"{len(document['groups']):,}"),
        ("stored as", document["dtype"]),
        ("experts before", human_bytes(size["experts"])),
        ("base + deltas", human_bytes(stored)),
        ("of what it was", f"{stored / size['experts']:.1%}" if size["experts"] else "-"),
        ("bits per delta weight", "-" if bits is None else f"{bits:.3f}"),
        ("base", document["base"]),
    ]
    return f"""<h1>{_text(document["model"])}</h1>
<p class="soft">A DeRS checkpoint: one base and light deltas. Errors are those noted when it was made.</p>
{_facts(facts)}
<h2>Recipe</h2><pre>{_text_block(document["recipe"])}</pre>"""


# --- tables ---


def _tables(document: dict[str, Any]) -> str:
    tables = [_standout_table(document)]
    if document["kind"] == "analysis":
        tables += [_codec_table(document), _base_table(document), _alignment_table(document)]
    return "".join(tables)


def _table(title: str, says: str, header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return f"<section><h2>{title}</h2><p class='says'>{says}</p></section>"
    head = "".join(f"<th>{name}</th>" for name in header)
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<section><h2>{title}</h2><p class='says'>{says}</p>"
        f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></section>"
    )


def _standout_table(document: dict[str, Any]) -> str:
    found = standouts(document)
    says = "Far from the other groups of the same projection: look here first." if found else "No group stands out."
    rows = [[one.name, one.quantity, _number(one.value), _number(one.usual), _number(one.z)] for one in found]
    return _table("What stands out", says, ["group", "what", "mean here", "median", "deviations"], rows)


def _codec_table(document: dict[str, Any]) -> str:
    rows = [
        [
            term,
            _number(codec["bits_per_delta_weight"]),
            "-" if codec["folder_bytes"] is None else human_bytes(codec["folder_bytes"]),
            _number(codec["output_error"]),
            _number(codec["worst_output_error"]),
            codec["worst"] or "-",
        ]
        for term, codec in document["codecs"].items()
    ]
    header = ["codec", "bits per weight", "folder", "output error", "worst expert's", "which"]
    return _table("Codecs", "Predicted for the whole model.", header, rows) if rows else ""


def _base_table(document: dict[str, Any]) -> str:
    rows = [
        [
            one["base"],
            _number(one["relative_norm"]),
            "-" if one["exact_bytes"] is None else human_bytes(one["exact_bytes"]),
        ]
        for one in document["bases"]
    ]
    says = "What the deltas would be with each base."
    return _table("Bases", says, ["base", "|D| / |W|", "exact deltas"], rows) if rows else ""


def _alignment_table(document: dict[str, Any]) -> str:
    found = document["alignment"]
    if not found or not found["permuted"]:
        return ""
    rows = [[one["name"], ", ".join(one["experts"][:32]) or "-", _number(one["matched"])] for one in found["layers"]]
    says = "Neurons of these experts stand in another order than the base's; aligned, their deltas are smaller."
    return _table("Neurons in another order", says, ["layer", "experts", "share matched"], rows[:100])


def _number(value: float | None) -> str:
    if value is None or value != value or abs(value) == float("inf"):
        return "-"
    return f"{value:.4g}"
