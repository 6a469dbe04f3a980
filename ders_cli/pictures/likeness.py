"""How alike experts are, and the rows of their routers: layers x projections, expert against expert, layer by layer.

Cosines of experts that one dense model became differ after the fifth nine, where fp32 ends; such are drawn as 1 - cosine.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .figure import HOVER_ALL, SHADES, Figure, Option, layer_axis, lines, mean_of, plain
from .tables import Axes, layer_name, per_layer

MOST_PAIRS = 400_000  # of all pictures together: 4 bytes each
NEAR = 0.9

Cosine = dict[str, Any]


@dataclass(frozen=True)
class _Scale:
    """What stands for a cosine in a picture."""

    name: str
    of: Callable[[float | None], float | None]


PLAIN = _Scale("cosine", lambda cosine: cosine)
SMALL = _Scale("1 - cosine", lambda cosine: None if cosine is None else 1 - cosine)


def _scale(cosines: Iterable[Cosine]) -> _Scale:
    """One for all that are compared."""
    return SMALL if all((cosine["least"] or 0) > NEAR for cosine in cosines) else PLAIN


def overview(document: dict[str, Any], at: Axes) -> Figure:
    """Layers x projections: one cell a group."""
    scale = _scale(group["cosine"] for group in document["groups"])
    wanted = {
        f"mean {scale.name} of two experts": lambda group: scale.of(group["cosine"]["mean"]),
        f"{scale.name} of the least alike": lambda group: scale.of(group["cosine"]["least"]),
        "mean |D| / |W|": lambda group: mean_of(group["delta"]["relative_norm"]),
        "mean share of equal bits": lambda group: mean_of(group["delta"]["equal"]),
    }
    options = []
    for name, of in wanted.items():
        cells = per_layer(at, document["groups"], of)
        z = np.stack([cells[projection] for projection in at.projections])
        if not np.isfinite(z).any():
            continue
        trace = {"type": "heatmap", "z": z, "x": at.layers, "y": at.projections, "coloraxis": "coloraxis"}
        trace["hovertemplate"] = "layer %{x}, %{y}: %{z:.6g}<extra></extra>"
        layout = {"xaxis": layer_axis(), "yaxis": {"type": "category", "autorange": "reversed"}, "height": 260}
        options.append(Option((name,), [trace], layout | {"coloraxis": SHADES}))
    says = "Experts upcycled from one dense model keep a cosine near 1 and a small |D| / |W|."
    return Figure("alike", "How alike the experts are", says, options, ("quantity",))


@dataclass(frozen=True)
class _Pairs:
    """Cosines of all pairs of a group's experts, or of a router's rows."""

    layer: str
    of: str  # projection, or router
    experts: list[str]
    cosine: Cosine


def pairs(document: dict[str, Any], at: Axes) -> Figure:
    """Of as many groups as fit: experts before routers, those whose pairs differ most first."""
    every = _every_pairs(document, at)
    scales = {kind: _scale(one.cosine for one in every if (one.of == "router") == kind) for kind in (False, True)}
    have = [one for one in every if one.cosine["pairs"]]
    kept, cells = set(), 0
    for one in sorted(have, key=lambda one: (one.of == "router", -_spread(one.cosine))):
        cells += len(one.experts) ** 2
        if cells <= MOST_PAIRS:
            kept.add(id(one))
    options = [_pair_map(one, scales[one.of == "router"]) for one in have if id(one) in kept]
    left = len(every) - len(options)
    note = f" Of {left} others there is no picture here: more experts or groups than fit a page." if left else ""
    says = f"Every two experts' weights, by the cosine of their angle, and every two rows of the router.{note}"
    return Figure("pairs", "Expert against expert", says, options, ("layer", "matrices"))


def _every_pairs(document: dict[str, Any], at: Axes) -> list[_Pairs]:
    found = [
        _Pairs(at.layers[at.rows[layer_name(group)]], group["projection"], group["experts"], group["cosine"])
        for group in document["groups"]
    ]
    for router in document["routers"]:
        rows = [str(i) for i in range(len(router["cosine"]["pairs"] or []))]
        found.append(_Pairs(str(router["layer"]), "router", rows, router["cosine"]))
    return found


def _spread(cosine: Cosine) -> float:
    return (cosine["most"] or 0) - (cosine["least"] or 0)


def _pair_map(one: _Pairs, scale: _Scale) -> Option:
    labels = [plain(label) for label in one.experts]
    z = np.array([[scale.of(cosine) for cosine in row] for row in one.cosine["pairs"]], np.float64)
    np.fill_diagonal(z, np.nan)  # itself, which would take up the scale
    trace = {"type": "heatmap", "z": z, "x": labels, "y": labels, "coloraxis": "coloraxis"}
    trace["hovertemplate"] = "experts %{y} and %{x}: %{z:.5g}<extra></extra>"
    axis = {"type": "category", "title": {"text": "expert"}, "showgrid": False}
    side = int(np.clip(44 * len(labels), 280, 620))
    layout = {
        "xaxis": axis | {"constrain": "domain"},
        "yaxis": axis | {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
        "coloraxis": SHADES | {"colorbar": SHADES["colorbar"] | {"title": {"text": scale.name, "side": "right"}}},
        "height": side + 110,
    }
    return Option((f"layer {one.layer}", one.of), [trace], layout)


def routers(document: dict[str, Any]) -> Figure | None:
    """Layer by layer, for all pairs of a router's rows."""
    known = [router for router in document["routers"] if router["cosine"]["mean"] is not None]
    if not known:
        return None
    scale = _scale(router["cosine"] for router in known)
    bounds = [
        np.array([scale.of(router["cosine"][of]) for router in known], np.float64) for of in ("least", "mean", "most")
    ]
    traces = lines([str(router["layer"]) for router in known], *bounds, "router")
    layout = {"xaxis": layer_axis(), "yaxis": {"title": {"text": f"{scale.name} of rows"}}, "height": 320}
    says = "Rows that point the same way choose the same tokens; the band reaches from the least alike two experts to the most."
    return Figure("routers", "How alike the routers' rows are", says, [Option((), traces, layout | HOVER_ALL)])
