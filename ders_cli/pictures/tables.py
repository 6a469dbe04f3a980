"""A report's lists of groups as arrays that figures are drawn from: layers x experts, and layers alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from ..report import visible
from .quantities import PROJECTIONS, Group

MOST = 4_000_000  # cells of a projection's picture: 16 MB


@dataclass(frozen=True)
class Axes:
    """Rows are layers (a fine-grained slice is one of its own), columns experts."""

    rows: dict[str, int]  # group name without its projection -> row
    layers: list[str]  # of a row, for a reader
    columns: dict[str, int]  # expert's label -> column
    projections: list[str]

    @property
    def experts(self) -> list[str]:
        return [visible(label) for label in self.columns]


def layer_name(group: Group) -> str:
    """ "model.layers.3.mlp.experts" of ".gate_proj" in it."""
    return group["name"].rpartition(".")[0]


def axes(groups: Sequence[Group]) -> Axes:
    """Layers in the order of their numbers, experts as they first come. Raises UsageError where these are too many to draw."""
    first: dict[str, int] = {}
    for group in groups:
        first.setdefault(layer_name(group), group["layer"])
    names = sorted(first, key=lambda name: first[name])  # stable: slices stay in order
    times = Counter(first.values())
    shown = [str(first[n]) if times[first[n]] == 1 else f"{first[n]} {visible(n)}" for n in names]
    labels = dict.fromkeys(label for group in groups for label in group["experts"])
    if len(first) * len(labels) > MOST:
        raise UsageError(
            f"{len(first)} layers and {len(labels)} experts' labels: expected at most {MOST:,} pairs to draw"
        )
    here = {group["projection"] for group in groups}
    return Axes(
        {name: i for i, name in enumerate(names)},
        shown,
        {label: i for i, label in enumerate(labels)},
        [p for p in PROJECTIONS if p in here],
    )


def per_expert(axes: Axes, groups: Sequence[Group], of: Callable[[Group], Any]) -> dict[str, np.ndarray]:
    """Projection -> fp32 [layers, experts]; `of` a group gives E numbers. NaN where there is none."""
    shape = (len(axes.rows), len(axes.columns))
    found = {projection: np.full(shape, np.nan, np.float32) for projection in axes.projections}
    with np.errstate(over="ignore"):
        for group in groups:
            columns = [axes.columns[label] for label in group["experts"]]
            found[group["projection"]][axes.rows[layer_name(group)], columns] = np.asarray(of(group), np.float64)
    for cells in found.values():
        cells[np.isinf(cells)] = np.nan  # past fp32's range
    return found


def per_layer(axes: Axes, groups: Sequence[Group], of: Callable[[Group], float | None]) -> dict[str, np.ndarray]:
    """Projection -> fp32 [layers]; `of` a group gives one number or None."""
    found = {projection: np.full(len(axes.rows), np.nan, np.float32) for projection in axes.projections}
    for group in groups:
        value = of(group)
        if value is not None:
            found[group["projection"]][axes.rows[layer_name(group)]] = value
    return found
