"""topK: keep the share K of largest magnitude of every row, the rest is dropped, and the gain rule restores the size.

k = round(K * in) entries a row; ties go to the lower column. Without gain the expert falls back toward its base (the
largest 10 % carry about half of the delta's energy); with it a row's kept values are multiplied by
sum(d^2) / sum(kept^2). Below a few per cent the gain blows up a few outliers: use ternary or drop there.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.cpu_ops import select
from ders_kernels.packing import pack_positions, position_bytes, unpack_positions

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import Parts, SelectiveCodec, gain


@dataclass(frozen=True)
class TopCodec(SelectiveCodec):
    """Positions as `bitmap`, or `low` and `high` (ders_kernels.packing); `values` [out, k] BF16."""

    density: float
    name: ClassVar[str] = "top"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"top(\d+(?:\.\d+)?|\.\d+)")

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(f"top{self.density:g}: expected a share above 0 ... 1, such as top0.1")

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "TopCodec":
        return cls(float(match[1]))

    @property
    def term(self) -> str:
        return f"top{np.format_float_positional(self.density, trim='-')}"

    def kept(self, width: int) -> int:
        return max(1, round(self.density * width))

    def position_spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        sizes = position_bytes(self.kept(shape[1]), shape[1], unused=False)
        return {part: TensorSpec((shape[0], size), "U8") for part, size in sizes.items()}

    def select(self, delta: np.ndarray, key: int, row: int) -> tuple[Parts, np.ndarray]:
        columns = np.empty((delta.shape[0], self.kept(delta.shape[1])), np.int32)
        select.largest(select.magnitudes(delta), columns)
        values = np.empty(columns.shape, np.float32)
        select.gather(np.ascontiguousarray(delta), columns, np.float32(1), values)
        return pack_positions(columns, delta.shape[1], unused=False), values * gain(delta, values)

    def columns(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        return unpack_positions(parts, self.kept(shape[1]), shape[1], unused=False, first_row=row)

    def encode_expert(self, expert: np.ndarray, base: np.ndarray, dtype: str, key: int, row: int) -> Parts:
        if dtype == "BF16":
            rows, width = expert.shape
            columns, ratios = np.empty((rows, self.kept(width)), np.int32), np.empty(rows, np.float32)
            values, pair = (
                np.empty(columns.shape, np.uint16),
                (np.ascontiguousarray(expert), np.ascontiguousarray(base)),
            )
            if select.largest_bf16(*pair, columns, values, ratios):
                parts = pack_positions(columns, width, unused=False) | {"values": values}
                return self.settle(parts, ratios, expert, base, key, row)
        return super().encode_expert(expert, base, dtype, key, row)  # which says where it is not finite


CODEC = TopCodec
