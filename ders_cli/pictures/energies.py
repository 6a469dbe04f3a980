"""Where a delta's energy is: in how few singular values, in how few entries."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from . import colours
from .figure import MOST_LAYERS, Figure, Option
from .quantities import PROJECTIONS, Group
from .tables import Axes, layer_name


def energies(document: dict[str, Any], at: Axes) -> Figure | None:
    groups = [group for group in document["groups"] if group["rank_energy"] or group["density_energy"]]
    if not groups:
        return None
    rows = np.unique(np.linspace(0, len(at.layers) - 1, min(MOST_LAYERS, len(at.layers))).astype(int))
    shown = {name for name, row in at.rows.items() if row in rows}
    options = [_energies("all layers", groups)]
    for name, row in at.rows.items():
        here = [group for group in groups if name in shown and layer_name(group) == name] if name in shown else []
        options += [_energies(f"layer {at.layers[row]}", here)] if here else []
    says = (
        "How much of |D|² the first r singular values hold, and the largest entries: steep curves favour rank and top codecs, "
        "flat ones integers. Bars are standard errors; over all layers, the standard deviation between layers."
    )
    return Figure("energy", "Where the delta's energy is", says, options, ("layers",))


def _energies(name: str, groups: list[Group]) -> Option:
    traces = []
    for projection in PROJECTIONS:
        here = [group for group in groups if group["projection"] == projection]
        ranks = [group["rank_energy"] for group in here if group["rank_energy"]]
        densities = [group["density_energy"] for group in here if group["density_energy"]]
        look = {"type": "scatter", "mode": "lines+markers", "line": {"color": colours.PROJECTION[projection]}}
        look |= {"name": projection, "legendgroup": projection}
        if ranks:
            traces.append(look | _curve([dict(zip(r["ranks"], zip(r["energy"], r["error"]))) for r in ranks]))
        if densities:
            curve = _curve([{q: (e, None) for q, e in zip(d["densities"], d["energy"])} for d in densities])
            traces.append(look | curve | {"xaxis": "x2", "showlegend": not ranks})
    ranks, densities = (
        [x for trace in traces if trace.get("xaxis") == axis for x in trace["x"]] for axis in (None, "x2")
    )
    left, right = ([0, 0.47], [0.53, 1]) if ranks and densities else ([0, 1], [0, 1])
    layout = {"yaxis": {"title": {"text": "share of |D|²"}, "range": [0, 1.03]}, "height": 360}
    layout |= {"xaxis": _log_axis("rank", left, ranks)} if ranks else {}
    layout |= {"xaxis2": _log_axis("density", right, densities)} if densities else {}
    layout["legend"] = {"orientation": "h", "y": 1.12}
    return Option((name,), traces, layout)


def _log_axis(title: str, domain: list[float], values: Iterable[float | None]) -> dict[str, Any]:
    """With a tick at each value that somebody has."""
    ticks = sorted({value for value in values if value})
    return {
        "type": "log",
        "title": {"text": title},
        "domain": domain,
        "tickvals": ticks,
        "ticktext": [f"{t:g}" for t in ticks],
    }


def _curve(groups: list[dict[float, tuple[float | None, float | None]]]) -> dict[str, Any]:
    """x -> (energy, its standard error) of some groups: one curve, with the spread between the groups if there are several."""
    x = sorted({at for group in groups for at in group if at is not None})
    energies = [[group[at][0] for group in groups if at in group and group[at][0] is not None] for at in x]
    if len(groups) == 1:
        error = [groups[0][at][1] or 0.0 for at in x]
    else:
        error = [float(np.std(values)) if values else 0.0 for values in energies]
    y = np.array([np.mean(values) if values else np.nan for values in energies], np.float32)
    bars = {"type": "data", "array": error, "thickness": 1.2, "width": 3}
    return {"x": x, "y": y, "error_y": bars, "hovertemplate": "%{x}: %{y:.4f}<extra>%{fullData.name}</extra>"}
