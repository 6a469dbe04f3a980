"""All figures of a report, in the order of reading; here those of codecs and of every expert's numbers.

Whatever the size of the model, a figure has a few traces, and what would not fit a page (cosines of all pairs of 1,000 layers) is
left to the JSON: a note says so.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import colours, likeness, sizes
from .energies import energies
from .figure import BAR, HOVER_ALL, SHADES, Figure, Option, layer_axis, lines, plain
from .quantities import QUANTITIES, Group, Quantity, terms_by_size
from .tables import Axes, axes, per_expert

MOST_CELLS = 1_000_000  # of all pictures of experts together: a byte each, which hardly compresses
HOVER = "layer %{y}, expert %{x}: %{z:.5g}<extra></extra>"


def figures(document: dict[str, Any]) -> list[Figure]:
    """All figures of a report that have something to show, in the order of reading."""
    at = axes(document["groups"])
    if document["kind"] == "conversion":
        found = [_plan(document, at), sizes.stored(document), _by_layer(document, at), _experts(document, at)]
    else:
        found = [
            _plan(document, at),
            sizes.against_error(document),
            sizes.folders(document),
            likeness.overview(document, at),
            _by_layer(document, at),
            _experts(document, at),
            likeness.pairs(document, at),
            energies(document, at),
            likeness.routers(document),
        ]
    return [figure for figure in found if figure and figure.options]


def _panels(
    at: Axes, arrays: dict[str, np.ndarray], trace: dict[str, Any], colour: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One heat map a projection, side by side, with one colour bar: traces and layout."""
    rows, labels = len(at.rows), [plain(label) for label in at.experts]
    share, layout = 1 / len(arrays), {"coloraxis": colour, "height": int(np.clip(14 * rows, 160, 760)) + 110}
    traces = []
    for i, (projection, cells) in enumerate(arrays.items()):
        number = str(i + 1) if i else ""
        traces.append(
            {
                "type": "heatmap",
                "z": cells,
                "x": labels,
                "y": at.layers,
                "xaxis": f"x{number}",
                "coloraxis": "coloraxis",
            }
            | trace
            | {"name": projection}
        )
        layout[f"xaxis{number}"] = {
            "domain": [i * share + 0.012 * (i > 0), (i + 1) * share - 0.012 * (i + 1 < len(arrays))],
            "title": {"text": projection},
            "type": "category",
            "showgrid": False,
        }
    layout["yaxis"] = {"type": "category", "autorange": "reversed", "title": {"text": "layer"}, "showgrid": False}
    return traces, layout


def _plan(document: dict[str, Any], at: Axes) -> Figure | None:
    terms = terms_by_size(document)
    if not terms:
        return None
    number = {term: i for i, term in enumerate(terms)}
    arrays = per_expert(at, document["groups"], lambda group: [number[term] for term in group["plan"]])
    names = [plain(term) for term in terms]
    traces, layout = _panels(
        at,
        arrays,
        {"meta": {"names": names}, "hovertemplate": "layer %{y}, expert %{x}: %{text}<extra>%{fullData.name}</extra>"},
        _codec_axis(names),
    )
    says = (
        "The codec of every expert's matrix"
        if document["kind"] == "conversion"
        else "What the recommended recipe gives, a column an expert"
    )
    return Figure("plan", "The plan", f"{says}; the smallest codec has the first colour.", [Option((), traces, layout)])


def _codec_axis(names: list[str]) -> dict[str, Any]:
    """A colour axis in steps, one for each codec."""
    count, steps = len(names), []
    for i, colour in enumerate(colours.codec_colours(count)):
        steps += [[i / count, colour], [(i + 1) / count, colour]]
    bar = {
        "tickvals": list(range(count)),
        "ticktext": names,
        "len": min(1.0, 0.25 + 0.12 * count),
        "y": 1,
        "yanchor": "top",
    }
    return {"colorscale": steps, "cmin": -0.5, "cmax": count - 0.5, "colorbar": bar | BAR}


def _experts(document: dict[str, Any], at: Axes) -> Figure:
    cells, options = len(at.rows) * len(at.columns) * max(1, len(at.projections)), []
    shown = QUANTITIES[document["kind"]][: max(1, MOST_CELLS // max(1, cells))]
    for quantity in shown:
        arrays = per_expert(at, document["groups"], quantity.values)
        if any(np.isfinite(array).any() for array in arrays.values()):
            colour = SHADES
            options.append(Option((quantity.name,), *_panels(at, arrays, {"hovertemplate": HOVER}, colour)))
    left = len(QUANTITIES[document["kind"]]) - len(shown)
    note = f" Left out of this page for its size: {left} more, which the JSON has." if left else ""
    legend = "; ".join(f"{quantity.name}: {quantity.says}" for quantity in shown)
    return Figure("experts", "Every expert", f"A column an expert. {legend}.{note}", options, ("quantity",))


def _by_layer(document: dict[str, Any], at: Axes) -> Figure:
    options = []
    for quantity in QUANTITIES[document["kind"]]:
        traces = [
            trace for projection in at.projections for trace in _band(document["groups"], at, quantity, projection)
        ]
        if traces:
            layout = {"xaxis": layer_axis(), "yaxis": {"title": {"text": quantity.name}}, "height": 380}
            options.append(Option((quantity.name,), traces, layout | HOVER_ALL))
    says = "The line is the mean over a layer's experts, the band reaches from the least to the most of them."
    return Figure("layers", "Layer by layer", says, options, ("quantity",))


def _band(groups: Sequence[Group], at: Axes, quantity: Quantity, projection: str) -> list[dict[str, Any]]:
    """Least, most and mean over a layer's experts: three traces, or none if nothing is known."""
    cells = per_expert(at, groups, quantity.values)[projection]
    if not np.isfinite(cells).any():
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a layer of nothing but NaN gives NaN
        least, mean, most = np.nanmin(cells, 1), np.nanmean(cells, 1), np.nanmax(cells, 1)
    return lines(at.layers, least, mean, most, projection)
