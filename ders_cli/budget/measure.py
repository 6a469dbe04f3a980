"""What there is to choose from: for every matrix of every expert the bytes and the predicted error of each candidate.

A *cell* is what a recipe's rule can name: layer, projection, expert. Its cost with a codec is the energy of the error that the codec
alone makes in the outputs of the expert's FFN, relative to the outputs, times the expert's weight, over the number of experts:

    cost = weight |y' - y|^2 / |y|^2 / experts of all layers

so that the sum of a plan's costs is the mean square of the relative output error (errors of matrices are nearly uncorrelated). The
weight is 1, or with activations that know the routing MC#'s importance phi w^1.5 (pmq.py), scaled to a mean of 1 in a layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..analysis.blocks import PROJECTIONS, Block, layers_of, observe_layer
from ..analysis.prediction import LayerPrediction, Predicted
from ..base import Base
from ..checkpoint.tensor import TensorSpec
from ..codecs import DeltaCodec
from ..compare import random_states
from ..engines import local
from ..errors import UsageError
from ..layouts import ExpertGroup
from ..report import Progress, shown
from ..source import Source
from .choice import Item
from .pmq import importance

if TYPE_CHECKING:
    from ..activations import Activations

TOKENS = 64  # hidden states that outputs are predicted on
ROWS = 128  # of every matrix that are coded: errors then are within 1-2 % of all rows' (docs/results.md)
# of a delta, <D', D> / |D|^2: a codec that keeps less or more moves all layers the same way, to the base or past the expert
LEAST_KEPT, MOST_KEPT = 0.95, 1.1
LEAST_WEIGHT = 0.01  # of an expert that a sample of text hardly met, in shares of the mean one
SAME = "none"  # the codec of a matrix that equals its base


@dataclass(frozen=True)
class Cell:
    """One matrix of one expert and what it may become.

    found: term -> (bytes on disk, cost), of every candidate that can be used. stream: bytes of an exact stream among them.
    same: every bit equals the base's, and is finite.
    """

    layer: int
    projection: str
    label: str
    weights: int
    found: Mapping[str, tuple[int, float]]
    stream: int
    same: bool

    @property
    def options(self) -> dict[str, tuple[int, float]]:
        """What a budget may choose: nothing at all where nothing is needed."""
        return {SAME: (0, 0.0)} if self.same else dict(self.found)

    @property
    def item(self) -> Item:
        """As the solvers take it."""
        sizes, costs = zip(*self.options.values(), strict=True)
        return Item(sizes, costs)


class SameAsBase:
    """An observer of the experts all whose bits are the base's."""

    def __init__(self) -> None:
        self.different: set[tuple[str, str]] = set()  # projection, label

    def add(self, block: Block) -> None:
        for (label, _), expert in zip(block.group.members, block.experts, strict=True):
            at = (block.group.projection, label)
            if at not in self.different and not np.array_equal(expert, block.base):
                self.different.add(at)


def measure(
    source: Source,
    base: Base | None,
    codecs: Sequence[DeltaCodec],
    seed: int,
    activations: "Activations | None",
    jobs: int,
    quiet: bool,
) -> list[Cell]:
    """One pass over the experts; cells by layer, projection and expert. Raises UsageError where a matrix has no option."""
    layers = layers_of(source)
    experts = sum(len(_labels(groups)) for groups in layers.values())
    total = sum(TensorSpec(group.shape, group.dtype).nbytes * len(group.members) for group in source.groups)
    with shown("weighing codecs", total, quiet) as progress:
        job = partial(_measure_layer, source, base, codecs, seed, activations, experts, progress)
        cells = [
            cell for found in local.run([partial(job, *layer) for layer in layers.items()], jobs) for cell in found
        ]
    return _joined(cells)


def _measure_layer(
    source: Source,
    base: Base | None,
    codecs: Sequence[DeltaCodec],
    seed: int,
    activations: "Activations | None",
    experts: int,
    progress: Progress,
    name: str,
    groups: Mapping[str, ExpertGroup],
) -> list[Cell]:
    labels = _labels(groups)
    states = _states(activations, name, groups, seed)
    weights = dict.fromkeys(labels, 1.0) if activations is None else _weights(activations, name, labels)
    prediction = LayerPrediction(
        groups, source.activation, states, codecs, seed, ROWS, exact_bytes=any(codec.lossless for codec in codecs)
    )
    same = SameAsBase()
    observe_layer(source, base, groups, [prediction, same], progress.advance)
    exact, cells = next((codec for codec in codecs if codec.lossless), None), []
    for p, found in prediction.found().items():
        pulling = _pulling(found, groups[p].shape)
        for label in labels:
            kept = {term: predicted for term, predicted in found[label].items() if term not in pulling}
            weight = weights[label] / experts
            alike = (p, label) not in same.different and prediction.finite(p, label)
            cells.append(_cell(groups[p], label, kept, weight, exact, alike))
    return cells


def _pulling(found: Mapping[str, Mapping[str, Predicted]], shape: tuple[int, int]) -> set[str]:
    """Terms that keep too little or too much of a group's deltas, by more than four times what sampling explains; never all.

    Codecs that are exact in the mean may do so too, where what they give is rounded to the weights' dtype.
    """
    terms, pulling = list(next(iter(found.values()))), set()
    for term in terms:
        members = [by[term] for by in found.values() if math.isfinite(by[term].kept)]
        if not members:
            continue
        kept, error = (float(np.mean([getattr(m, name) for m in members])) for name in ("kept", "delta_error"))
        chance = error / math.sqrt(min(shape[0], ROWS) * shape[1] * len(members))
        if not LEAST_KEPT - 4 * chance <= kept <= MOST_KEPT + 4 * chance:
            pulling.add(term)
    return pulling if len(pulling) < len(terms) else set()


def _cell(
    group: ExpertGroup,
    label: str,
    found: Mapping[str, Predicted],
    weight: float,
    exact: DeltaCodec | None,
    same: bool,
) -> Cell:
    options, stream = {}, 0
    for term, predicted in found.items():
        lossless = exact is not None and term == exact.term
        cost = 0.0 if lossless else weight * predicted.output_error**2
        if math.isfinite(cost):
            options[term] = (predicted.bytes, cost)
        if lossless:
            fixed = sum(spec.nbytes for spec in exact.spec(group.shape).values() if spec)
            stream = predicted.bytes - fixed
    if not options and not same:
        raise UsageError(
            f"{group.name}, expert {label}: its weights, outputs or base are not finite, which only exact keeps; "
            "add exact to the candidates"
        )
    return Cell(group.layer, group.projection, label, group.shape[0] * group.shape[1], options, stream, same)


def _labels(groups: Mapping[str, ExpertGroup]) -> list[str]:
    return [label for label, _ in groups["up"].members]


def _states(
    activations: "Activations | None", name: str, groups: Mapping[str, ExpertGroup], seed: int
) -> np.ndarray | dict[str, np.ndarray]:
    """fp32 [T, hidden], at most TOKENS: Gaussian ones, or of a file, for every expert those that are routed to it."""
    group, labels = groups["up"], _labels(groups)
    if activations is None:
        return random_states(seed, group.layer, TOKENS, group.shape[1])
    layer = activations.layer(name, labels)
    own = {label: layer.of(label)[0] for label in labels}
    return {label: _spread(states if len(states) else layer.states) for label, states in own.items()}


def _spread(states: np.ndarray) -> np.ndarray:
    """At most TOKENS of them, from the whole text."""
    return states[np.linspace(0, len(states) - 1, min(TOKENS, len(states))).astype(int)]


def _weights(activations: "Activations", name: str, labels: Sequence[str]) -> dict[str, float]:
    """MC#'s importance of a layer's experts, with a mean of about 1; 1 where routing is unknown."""
    counts, gates = zip(*(activations.importance(name, label) for label in labels), strict=True)
    weights = importance(counts, gates)
    mean = float(weights.mean())
    if mean == 0:
        return dict.fromkeys(labels, 1.0)
    return {label: max(LEAST_WEIGHT, float(weight / mean)) for label, weight in zip(labels, weights, strict=True)}


def _joined(cells: Sequence[Cell]) -> list[Cell]:
    """Cells that no rule can tell apart as one: those of layers that have one number under two stems."""
    found: dict[tuple[int, str, str], Cell] = {}
    for cell in cells:
        at = (cell.layer, cell.projection, cell.label)
        found[at] = _both(found[at], cell) if at in found else cell
    return sorted(found.values(), key=lambda cell: (cell.layer, PROJECTIONS.index(cell.projection)))


def _both(a: Cell, b: Cell) -> Cell:
    options = {t: (a.found[t][0] + b.found[t][0], a.found[t][1] + b.found[t][1]) for t in a.found if t in b.found}
    return Cell(a.layer, a.projection, a.label, a.weights + b.weights, options, a.stream + b.stream, a.same and b.same)
