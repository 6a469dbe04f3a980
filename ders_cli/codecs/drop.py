"""dropP: keep a random share 1 - P of every row, scaled up so that the mean is the delta. No positions are stored.

DARE (arXiv 2311.03099), the paper's sparsification (arXiv 2503.01359, eq. 4), with the count of each row fixed:
exactly k = round((1 - P) * in) entries are kept, those with the k largest draws of the counter generator, and their
values become d * in / k. Every entry is kept with the same probability k / in, as in DARE; the fixed count makes the
size known in advance and every row addressable.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.counter_rng import draw
from ders_kernels.cpu_ops import select

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import Parts, SelectiveCodec


@dataclass(frozen=True)
class DropCodec(SelectiveCodec):
    """`values` [out, k] BF16, in ascending order of their columns."""

    rate: float
    name: ClassVar[str] = "drop"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"drop(\d*\.?\d+)")

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UsageError(f"drop{self.rate:g}: expected a share of 0 ... below 1, such as drop0.9")

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "DropCodec":
        return cls(float(match[1]))

    @property
    def term(self) -> str:
        return f"drop{np.format_float_positional(self.rate, trim='-')}"

    def kept(self, width: int) -> int:
        return max(1, round((1 - self.rate) * width))

    def position_spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {}

    def select(self, delta: np.ndarray, key: int, row: int) -> tuple[Parts, np.ndarray]:
        width = delta.shape[1]
        values = np.take_along_axis(delta, self.columns({}, delta.shape, key, row), axis=1)
        return {}, values * np.float32(width / self.kept(width))

    def columns(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        rows, width = shape
        columns = np.empty((rows, self.kept(width)), np.int32)
        select.largest(draw(key, row * width, rows * width).reshape(shape), columns)
        return columns


CODEC = DropCodec
