"""A figure as data for plotly (https://plotly.com/javascript/reference/), and what figures have in common.

A figure has options, of which a reader sees one at a time; the page makes a selector of each part of their names.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..report import visible
from . import colours

MOST_LAYERS = 96  # in a selector, and with a mark for each in a line
QUIET = {"showgrid": False, "zeroline": False}
BAR = {"thickness": 14, "outlinewidth": 0}
SHADES = {"colorscale": colours.SCALE, "colorbar": BAR | {"exponentformat": "power"}}
HOVER_ALL = {"hovermode": "x unified", "legend": {"orientation": "h", "y": 1.12}}


@dataclass(frozen=True)
class Option:
    name: tuple[str, ...]  # one part for each selector
    data: list[dict[str, Any]]  # plotly's traces
    layout: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    key: str  # in the page
    title: str
    says: str  # what to see in it
    options: list[Option]
    selectors: tuple[str, ...] = ()  # their names, one for each part of an option's name


def plain(text: str) -> str:
    """A stranger's text for plotly, which takes <b> and <a href> in text for markup, and & for an entity."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def lines(x: list[str], least: np.ndarray, mean: np.ndarray, most: np.ndarray, name: str) -> list[dict[str, Any]]:
    colour, mode = colours.PROJECTION[name], "lines+markers" if len(x) <= MOST_LAYERS else "lines"
    edge = {"type": "scatter", "x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    fill = {"fill": "tonexty", "fillcolor": colours.translucent(colour, 0.22)}
    shown = {"type": "scatter", "x": x, "y": mean, "mode": mode, "name": name, "line": {"color": colour}}
    template = "%{y:.5g} (%{customdata[0]:.5g} to %{customdata[1]:.5g})"
    between = {"customdata": np.stack([least, most], 1), "hovertemplate": template, "marker": {"size": 4}}
    group = {"legendgroup": name}
    return [edge | {"y": least} | group, edge | {"y": most} | fill | group, shown | between | group]


def layer_axis() -> dict[str, Any]:
    return {"type": "category", "title": {"text": "layer"}, "showgrid": False}


def mean_of(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
