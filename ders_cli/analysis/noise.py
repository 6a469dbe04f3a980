"""Is a delta mere noise: independent normal numbers of one size, as some tools add them to copies of an FFN?

Then its kurtosis is 3, and no row and no column has more energy than chance gives it. Rounding hides this: of a weight far
larger than the noise the stored dtype keeps nothing of it, or one whole step. So only weights are looked at whose steps are
fine beside the noise, |base| <= 2^(mantissa bits - 2) * rms(d): their steps are a quarter of it or less. 256 rows of a
matrix, evenly spaced, are enough. `ders upcycle --noise` scales with the row's root mean square, so both are tried: rows as
they are, and in units of their base's.

    spread of n sums of m squares:  mean over sums of (S - m v)^2 / (m v^2 (kurtosis - 1)):  1 by chance, more where some stand out
"""

import math
from dataclasses import dataclass

import numpy as np
from ders_kernels.cpu_ops import floats, moments

from ..codecs.exact import EXPONENT_SHIFT
from .blocks import Block

ROWS = 256
LEAST = (
    100  # weights of a matrix, for its kurtosis: known to sqrt(24 / 100) = 0.5, and a verdict takes the mean of many
)


@dataclass(frozen=True)
class NoiseFound:
    """Of one expert's delta; NaN where too few weights are fine enough to tell. level: its standard deviation; of_rows: that
    relative to the root mean square of the base's rows. spreads: of the rows, as they are or relative, and of the columns."""

    level: float
    kurtosis: float
    row_spread: float
    column_spread: float


class Noise:
    """An observer of evenly spaced rows."""

    def __init__(self) -> None:
        self._rows: list[list[np.ndarray]] = []  # of each expert of the group under way
        self._columns: list[np.ndarray] = []
        self._found: dict[str, list[NoiseFound]] = {}

    def add(self, block: Block) -> None:
        (out, width), experts = block.group.shape, len(block.experts)
        if block.rows.start == 0:
            self._rows, self._columns = [[] for _ in range(experts)], [np.zeros((2, width)) for _ in range(experts)]
        every = max(1, out // ROWS)
        own = slice(-block.rows.start % every, None, every)
        base = floats.widen(np.ascontiguousarray(block.base[own]), block.group.dtype)
        reach = 2.0 ** (EXPONENT_SHIFT[block.group.dtype] - 2)
        for i in range(experts):
            found = np.empty((base.shape[0], 4))
            moments.fine_weights(np.ascontiguousarray(block.delta(i)[own]), base, reach, found, self._columns[i])
            self._rows[i].append(found)
        if block.rows.stop == out:
            judged = map(_judge, map(np.concatenate, self._rows), self._columns)
            self._found[block.group.projection] = list(judged)

    def found(self, projection: str) -> list[NoiseFound]:
        """Of each expert, once all rows were seen."""
        return self._found[projection]


def _judge(rows: np.ndarray, columns: np.ndarray) -> NoiseFound:
    number, two, four, size = rows[rows[:, 0] > 0].T if rows.size else np.empty((4, 0))
    if not np.isfinite(two).all() or number.sum() < LEAST:
        return NoiseFound(*[math.nan] * 4)
    level = math.sqrt(two.sum() / number.sum())
    there = columns[0] > 0
    ways = [_by_rows(number, two, four), _by_rows(number, two / size, four / size**2)] if (size > 0).all() else []
    kurtosis, spread = min(ways or [_by_rows(number, two, four)], key=lambda way: way[1])
    return NoiseFound(level, kurtosis, spread, _spread(columns[0, there], columns[1, there], kurtosis))


def _by_rows(number: np.ndarray, two: np.ndarray, four: np.ndarray) -> tuple[float, float]:
    """(kurtosis of all, spread of the rows)"""
    kurtosis = float(four.sum() * number.sum() / two.sum() ** 2) if two.any() else math.nan
    return kurtosis, _spread(number, two, kurtosis)


def _spread(number: np.ndarray, energy: np.ndarray, kurtosis: float) -> float:
    mean = energy.sum() / number.sum()
    if not mean > 0 or not kurtosis > 1:
        return math.inf
    return float(np.mean((energy - number * mean) ** 2 / (number * mean**2 * (kurtosis - 1))))
