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
from ders_kernels.cpu_ops import select

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import Parts, SelectiveCodec


@dataclass(frozen=True)
class DropCodec(SelectiveCodec):
    """`values` [out, k] BF16, in ascending order of their columns."""

    rate: float
    name: ClassVar[str] = "drop"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"drop(\d+(?:\.\d+)?|\.\d+)")

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
        columns = self.columns({}, delta.shape, key, row)
        values = np.empty(columns.shape, np.float32)
        select.gather(np.ascontiguousarray(delta), columns, self._scale(delta.shape[1]), values)
        return {}, values

    def columns(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        columns = np.empty((shape[0], self.kept(shape[1])), np.int32)
        starts = np.arange(shape[0] + 1) * columns.shape[1]
        select.largest_drawn(np.uint64(key), row, shape[1], starts, columns.reshape(-1))
        return columns

    def encode_expert(self, expert: np.ndarray, base: np.ndarray, dtype: str, key: int, row: int) -> Parts:
        if dtype == "BF16":
            columns = self.columns({}, expert.shape, key, row)
            values = np.empty(columns.shape, np.uint16)
            pair = np.ascontiguousarray(expert), np.ascontiguousarray(base)
            if select.gather_bf16(*pair, columns, self._scale(expert.shape[1]), values):
                return {"values": values}
        return super().encode_expert(expert, base, dtype, key, row)  # which says where it is not finite

    def _scale(self, width: int) -> np.float32:
        return np.float32(width / self.kept(width))


CODEC = DropCodec
