"""What each delta is like: its size, its shape (kurtosis), how its energy is shared out, and the weights' outlier columns.

    kurtosis         mean (d - mean d)^4 / variance^2: 3 for a Gaussian, more where few weights moved far
    outlier          max over columns j of max_i |W_ij| / mean_i |W_ij|: 1 where all weights of a column are equally large
    density energy   the share of |D|^2 in the largest |d|, for the largest 0.1 % of them, 0.3 %, ...

Energy by density comes from counts of |d| by size (3 % apart), of one row in four where a matrix is large: a share is right to
about a part in a hundred.
"""

import math
from dataclasses import dataclass

import numpy as np
from ders_kernels.cpu_ops import floats, moments

from .blocks import Block

EVERY, LARGE = 4, 1 << 20  # one row in so many is counted by size, of matrices of so many weights
DENSITIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class MomentsFound:
    """Of one expert's matrix; NaN where its delta holds a number that is not finite. `energy`: for each of DENSITIES."""

    energy: float  # |D|^2
    std: float
    kurtosis: float
    outlier: float
    density_energy: tuple[float, ...]


class Moments:
    """An observer that sums each expert's delta and columns."""

    def __init__(self) -> None:
        self._experts: list[_Expert] = []  # of the group under way
        self._found: dict[str, list[MomentsFound]] = {}

    def add(self, block: Block) -> None:
        if block.rows.start == 0:
            self._experts = [_Expert(*block.group.shape) for _ in block.experts]
        for i, expert in enumerate(self._experts):
            expert.add(block.delta(i), block.experts[i], block.group.dtype)
        if block.rows.stop == block.group.shape[0]:
            self._found[block.group.projection] = [expert.found() for expert in self._experts]
            self._experts = []

    def found(self, projection: str) -> list[MomentsFound]:
        """Of each expert, once all rows were seen."""
        return self._found[projection]


class _Expert:
    def __init__(self, out: int, width: int):
        self._powers, self._counts = np.zeros(4), np.zeros((2, moments.SIZES), np.uint32)
        self._every = EVERY if out * width >= LARGE else 1
        self._total, self._most, self._rows = np.zeros(width), np.zeros(width, np.float32), 0

    def add(self, delta: np.ndarray, bits: np.ndarray, dtype: str) -> None:
        powers, total = np.empty((delta.shape[0], 4)), np.zeros(delta.shape[1], np.float32)
        moments.delta_powers(delta, powers)
        moments.count_sizes(delta, -self._rows % self._every, self._every, self._counts)
        if dtype == "BF16":
            moments.column_sizes(bits, total, self._most)
        else:
            moments.column_sizes_fp32(floats.widen(bits, dtype), total, self._most)
        with np.errstate(invalid="ignore", over="ignore"):
            self._powers += powers.sum(axis=0)
            self._total += total
        self._rows += delta.shape[0]

    def found(self) -> MomentsFound:
        n = self._rows * self._total.size
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            mean, m2, m3, m4 = (float(p) / n for p in self._powers)
            variance = m2 - mean * mean
            fourth = m4 - 4 * mean * m3 + 6 * mean**2 * m2 - 3 * mean**4
            kurtosis = fourth / variance**2 if variance > 0 else math.nan
            ratio = np.where(self._total > 0, self._most * self._rows / self._total, 1.0)
        energy = float(self._powers[1])
        if not (math.isfinite(energy) and np.isfinite(self._total).all()):
            return MomentsFound(*[math.nan] * 4, (math.nan,) * len(DENSITIES))
        return MomentsFound(energy, math.sqrt(max(variance, 0)), kurtosis, float(ratio.max()), self._by_density())

    def _by_density(self) -> tuple[float, ...]:
        """From the largest size down; within a size all |d| count alike."""
        counts = self._counts.sum(axis=0, dtype=np.int64)[::-1]
        energies = counts * _squares()[::-1]
        if not energies.any():
            return (math.nan,) * len(DENSITIES)
        held, energy = np.concatenate([[0], counts.cumsum()]), np.concatenate([[0], energies.cumsum()])
        return tuple(float(np.interp(density * held[-1], held, energy) / energy[-1]) for density in DENSITIES)


def _squares() -> np.ndarray:
    """fp64 [SIZES]: the square of the middle of each size; 0 of those that are no numbers."""
    edges = (np.arange(moments.SIZES, dtype=np.uint32) << np.uint32(31 - moments.HALVES)).view(np.float32)
    edges = edges[np.isfinite(edges)].astype(np.float64)
    squares = np.zeros(moments.SIZES)
    squares[1 : edges.size - 1] = ((edges[1:-1] + edges[2:]) / 2) ** 2  # the first size is that of zeros
    return squares
