"""Bytes: of each codec against its error, and of the folders."""

from typing import Any

from ..report import human_bytes
from . import colours
from .figure import QUIET, Figure, Option, plain

BITS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4, 8, 16, 32]
BESIDE = (
    "middle right",
    "top center",
    "bottom center",
    "middle left",
)  # of its point a label: families lie close together


def against_error(document: dict[str, Any]) -> Figure | None:
    """Bits against error, a curve a family of codecs (int8 ... int1), as the predictions say."""
    known = {
        t: c for t, c in document["codecs"].items() if c["bits_per_delta_weight"] and c["output_error"] is not None
    }
    floor = min((c["output_error"] for c in known.values() if c["output_error"] > 0), default=1e-6) / 3
    families: dict[str, list[str]] = {}
    for term in sorted(known, key=lambda term: known[term]["bits_per_delta_weight"]):
        families.setdefault(family(term), []).append(term)
    if not known:
        return None
    traces = []
    for number, ((name, terms), colour) in enumerate(zip(families.items(), colours.codec_colours(len(families)))):
        here = [known[term] for term in terms]
        y = [max(c["output_error"], floor) for c in here]
        worst = [max(c["worst_output_error"] or 0, at) - at for c, at in zip(here, y)]
        detail = [
            [_bytes_text(c["folder_bytes"]), _percent(c["output_error"]), _percent(c["worst_output_error"])]
            for c in here
        ]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers+text" if len(known) <= 24 else "lines+markers",
                "x": [c["bits_per_delta_weight"] for c in here],
                "y": y,
                "text": [f" {plain(term)} " for term in terms],
                "textposition": BESIDE[number % len(BESIDE)],
                "customdata": detail,
                "error_y": {"type": "data", "array": worst, "symmetric": False, "thickness": 1, "width": 3},
                "name": plain(name),
                "line": {"color": colour, "width": 1.2},
                "marker": {"size": 8, "symbol": ["circle" if c["output_error"] > 0 else "star" for c in here]},
                "hovertemplate": "%{text}: %{x:.3f} bits, folder %{customdata[0]}<br>error %{customdata[1]}, worst expert "
                "%{customdata[2]}<extra></extra>",
            }
        )
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": "bits per delta weight"},
            "tickvals": BITS,
            "ticktext": [f"{b:g}" for b in BITS],
        },
        "yaxis": {"type": "log", "title": {"text": "output error |y' - y| / |y|"}, "tickformat": "~%", "dtick": "D2"},
        "height": 460,
    }
    says = "Predicted. Down and left is better. A bar reaches up to the worst expert; a star has no error, which has no place on this scale."
    return Figure("codecs", "Size against error", says, [Option((), traces, layout)])


def family(term: str) -> str:
    """Codecs that differ in a number only are one family: int4 and int8, drop0.9 and drop0.99."""
    return "+".join(part.rstrip("0123456789.:") or "N:M" for part in term.split("+"))


def _percent(share: float | None) -> str:
    return "not known" if share is None else f"{share:.3%}"


def _bytes_text(count: int | None) -> str:
    return "not known" if count is None else human_bytes(count)


def folders(document: dict[str, Any]) -> Figure:
    """The folder as each codec would leave it, the smallest on top."""
    sizes = {term: c["folder_bytes"] for term, c in document["codecs"].items() if c["folder_bytes"] is not None}
    rows = [("source", document["bytes"]["source"]), *sorted(sizes.items(), key=lambda pair: -pair[1])]
    return _bars("bytes", "Bytes of the whole folder", "Predicted, all files included.", rows)


def stored(document: dict[str, Any]) -> Figure:
    size = document["bytes"]
    rows = [("experts before", size["experts"]), ("base + deltas", size["base"] + size["delta"])]
    rows += [("  base", size["base"]), ("  deltas", size["delta"])]
    return _bars("bytes", "Bytes", "As they stand in the folder.", rows)


def _bars(key: str, title: str, says: str, rows: list[tuple[str, int]]) -> Figure:
    most, names = max([size for _, size in rows] + [1]), [plain(name) for name, _ in rows]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [size for _, size in rows],
        "y": list(range(len(rows))),
        "text": [f"{human_bytes(size)}  ({size / max(rows[0][1], 1):.1%})" for _, size in rows],
        "textposition": "outside",
        "cliponaxis": False,
        "customdata": names,
        "marker": {"color": ["#999999"] + [colours.CODECS[0]] * (len(rows) - 1)},
        "hovertemplate": "%{customdata}: %{x:,} bytes<extra></extra>",
    }
    layout = {
        "xaxis": {"range": [0, 1.28 * most], "title": {"text": "bytes"}, "exponentformat": "SI"},
        "yaxis": {"tickvals": list(range(len(rows))), "ticktext": names, "autorange": "reversed", **QUIET},
        "height": 110 + 26 * len(rows),
    }
    return Figure(key, title, says, [Option((), [trace], layout)])
