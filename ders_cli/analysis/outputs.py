"""Outputs of a layer's experts on some hidden states, gathered block by block, and what changes of a few rows do to them.

    h = act(gate x) * up x        y = down h        without gate: h = act(up x)

x is [in, T] here, tokens side by side. Of every expert and of the base the hidden products h [inner, T] are held from
gate to down; of y only energies. A change of some rows S of gate or up changes h in these neurons by dh [S, T], and y by
down[:, S] dh. Its energy is sum(dh * (G dh)), G = down[:, S]^T down[:, S] [S, S]: one product for all codecs, over all of
down's rows.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator

import numpy as np

from ..compare import gated

RUN_WEIGHTS = 1 << 15  # rows are coded by runs of neighbours of about this many weights: a call costs as much as 10,000
ENERGY_STEP = 1 << 16  # values that are widened at a time


class Sample:
    """Rows that stand for all rows of a matrix: runs of neighbours, each run as likely as any other.

    Which neurons stand side by side means nothing (any order is the same FFN), and rows of `down` are places of the hidden
    state, so neighbours are no more alike than others. `count` rows or more wanted: all of them, in one run.
    """

    def __init__(self, seed: int, name: str, count: int, wanted: int, width: int):
        length = max(1, min(wanted, RUN_WEIGHTS // max(1, width)))
        runs = -(-count // length)
        chosen = np.arange(runs)
        if wanted < count:
            digest = hashlib.sha256(f"sampled/{seed}/{name}".encode()).digest()[:16]
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            chosen = np.sort(generator.choice(runs, max(1, round(wanted * runs / count)), replace=False))
        bounds = [(count * run // runs, count * (run + 1) // runs) for run in chosen]  # lengths differ by 1 at most
        self.rows = np.concatenate([np.arange(*bound) for bound in bounds])  # ascending
        self.scale = count / self.rows.size  # of energies: what one row stands for

    def within(self, block: slice) -> Iterator[tuple[slice, slice]]:
        """(rows, their places in the sample) of each run of sampled rows in a block."""
        first, last = np.searchsorted(self.rows, (block.start, block.stop))
        rows = self.rows[first:last]
        breaks = [0, *(np.flatnonzero(np.diff(rows) > 1) + 1).tolist(), rows.size]
        for begin, end in zip(breaks, breaks[1:], strict=False):
            if begin < end:
                yield slice(int(rows[begin]), int(rows[end - 1]) + 1), slice(int(first) + begin, int(first) + end)


def energy(values: np.ndarray) -> float:
    """Sum of squares of fp32 values, in fp64."""
    flat, total = values.reshape(-1), 0.0
    for begin in range(0, flat.size, ENERGY_STEP):
        part = flat[begin : begin + ENERGY_STEP].astype(np.float64)
        total += float(part @ part)
    return total


class Ffn:
    """One FFN on some hidden states, block by block. `hidden` holds products with gate, from up's rows on what goes into down."""

    def __init__(self, states: np.ndarray, inner: int, gate: bool, activation: str):
        self.states = states  # fp32 [in, T]
        self.hidden = np.empty((inner, states.shape[1]), np.float32)
        self._gate, self._activation = gate, activation

    def inputs(self, projection: str) -> np.ndarray:
        """fp32 [in, T] that a projection is multiplied with."""
        return self.hidden if projection == "down" else self.states

    def multiply(self, projection: str, rows: slice, weight: np.ndarray) -> np.ndarray:
        """fp32 rows [rows, in] of a projection -> their products [rows, T]."""
        product = weight @ self.inputs(projection)
        if projection == "gate":
            self.hidden[rows] = product
        return product

    def settle(self, projection: str, rows: slice, product: np.ndarray) -> None:
        """After rows of up, their products [rows, T]: from here on `hidden` is what goes into down."""
        if projection == "up":
            self.hidden[rows] = self.activated(self.hidden[rows], product)

    def activated(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Products with gate (of no meaning where there is none) and up -> what goes into down."""
        return gated(gate if self._gate else None, up, self._activation)


class ChangedFfn:
    """One expert's FFN, and the energy of what each codec's change of some rows does to its outputs.

    Block by block: `multiply` its rows, `change` those of them that are sampled, `settle`.
    """

    def __init__(self, ffn: Ffn, projections: Iterable[str], codecs: int, neurons: Sample):
        """projections: those before down. neurons: the sampled rows of them."""
        size, tokens = neurons.rows.size, ffn.states.shape[1]
        self._ffn, self._neurons = ffn, neurons
        self._changes = {p: np.zeros((codecs, size, tokens), np.float32) for p in projections}
        self._gram = np.zeros((size, size), np.float32)
        self._down = np.zeros(codecs)
        self._energy, self._delta_energy = 0.0, 0.0  # of y and of y - y_base
        self._product = np.empty(0, np.float32)

    def multiply(self, projection: str, rows: slice, weight: np.ndarray, base: np.ndarray) -> None:
        """fp32 rows [rows, in] of a projection; the base's products [rows, T] with the same tokens."""
        self._product = self._ffn.multiply(projection, rows, weight)
        if projection == "down":
            self._energy += energy(self._product)
            self._delta_energy += energy(self._product - base)
            sampled = weight[:, self._neurons.rows]
            self._gram += sampled.T @ sampled

    def change(self, projection: str, places: slice, differences: np.ndarray) -> None:
        """Every codec's W' - W, fp32 [codecs, rows, in], of rows at some places of the sample."""
        codecs, rows, width = differences.shape
        products = differences.reshape(codecs * rows, width) @ self._ffn.inputs(projection)
        products = products.reshape(codecs, rows, products.shape[1])
        if projection == "down":
            self._down += [energy(product) for product in products]
        else:
            self._changes[projection][:, places] = products

    def settle(self, projection: str, rows: slice) -> None:
        """After rows of up: changes of products with gate or up become changes of what goes into down."""
        if projection == "up":
            for here, places in self._neurons.within(rows):
                self._settle_changes(self._ffn.hidden[here], self._product[here.start - rows.start :], places)
        self._ffn.settle(projection, rows, self._product)

    def _settle_changes(self, gate: np.ndarray, up: np.ndarray, places: slice) -> None:
        """In fp64: a change may be a millionth of what it changes."""
        gate, up = gate.astype(np.float64), up[: gate.shape[0]].astype(np.float64)
        before = self._ffn.activated(gate, up)
        for projection, changes in self._changes.items():
            change = changes[:, places]
            changed = (gate + change, up) if projection == "gate" else (gate, up + change)
            changes[:, places] = self._ffn.activated(*changed) - before

    def energies(self, projection: str) -> np.ndarray:
        """fp64 [codecs]: energy of the change of all outputs that the sampled rows of one projection make."""
        if projection == "down":
            return self._down
        with np.errstate(over="ignore", invalid="ignore"):  # of weights near the largest, products are infinite
            return np.array([np.vdot(change, self._gram @ change) for change in self._changes[projection]], np.float64)

    def errors(self, changed: float) -> tuple[float, float]:
        """Relative to the outputs, and to their difference from the base's; NaN without a token."""
        if self._ffn.states.shape[1] == 0:
            return math.nan, math.nan
        return _root_ratio(changed, self._energy), _root_ratio(changed, self._delta_energy)

    def base_error(self) -> float:
        """|y_base - y| / |y|; NaN without a token."""
        return self.errors(self._delta_energy)[0]


def _root_ratio(a: float, b: float) -> float:
    """sqrt(a / b) of energies; NaN where one is not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.nan
    return math.sqrt(max(0.0, a) / b) if b > 0 else (0.0 if a == 0 else math.inf)
