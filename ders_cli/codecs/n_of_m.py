"""N:M: keep the N entries of largest magnitude of every M consecutive inputs (2:4 is what sparse tensor cores take).

Ties go to the lower column; a tail of t < M inputs keeps min(N, t). The gain rule then restores the row's size.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.cpu_ops import n_of_m, select

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import Parts, SelectiveCodec, gain


@dataclass(frozen=True)
class NOfMCodec(SelectiveCodec):
    """`bitmap` [out, ceil(in / 8)] U8, bit c set if column c is kept; `values` [out, k] BF16."""

    n: int
    m: int
    name: ClassVar[str] = "n:m"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"(\d{1,9}):(\d{1,9})")

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= 64:
            raise UsageError(f"{self.n}:{self.m}: expected 1 <= N < M <= 64, such as 2:4")

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "NOfMCodec":
        return cls(int(match[1]), int(match[2]))

    @property
    def term(self) -> str:
        return f"{self.n}:{self.m}"

    def kept(self, width: int) -> int:
        return width // self.m * self.n + min(self.n, width % self.m)

    def position_spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"bitmap": TensorSpec((shape[0], (shape[1] + 7) // 8), "U8")}

    def select(self, delta: np.ndarray, key: int, row: int) -> tuple[Parts, np.ndarray]:
        rows, width = delta.shape
        bitmap, values = np.empty((rows, (width + 7) // 8), np.uint8), np.empty((rows, self.kept(width)), np.float32)
        n_of_m.keep(np.ascontiguousarray(delta), self.n, self.m, bitmap, values)
        return {"bitmap": bitmap}, values * gain(delta, values)

    def columns(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        columns = np.empty((shape[0], self.kept(shape[1])), np.int32)
        bad = select.columns_of_blocks(parts["bitmap"], shape[1], self.n, self.m, columns)
        if bad >= 0:
            raise ValueError(f"row {row + bad}: bitmap does not keep {self.n} of every {self.m}")
        return columns

    def encode_expert(self, expert: np.ndarray, base: np.ndarray, dtype: str, key: int, row: int) -> Parts:
        if dtype == "BF16":
            rows, width = expert.shape
            bitmap, values = np.empty((rows, (width + 7) // 8), np.uint8), np.empty((rows, self.kept(width)), np.uint16)
            ratios, pair = np.empty(rows, np.float32), (np.ascontiguousarray(expert), np.ascontiguousarray(base))
            if n_of_m.keep_bf16(*pair, self.n, self.m, bitmap, values, ratios):
                return self.settle({"bitmap": bitmap, "values": values}, ratios, expert, base, key, row)
        return super().encode_expert(expert, base, dtype, key, row)  # which says where it is not finite

    def decode_expert(self, parts: Parts, base: np.ndarray, dtype: str, key: int, row: int) -> np.ndarray:
        if dtype == "BF16" and (self.n, self.m) == (2, 4):
            out = np.empty(base.shape, np.uint16)
            if n_of_m.synthesize_two_of_four(parts["bitmap"], parts["values"], np.ascontiguousarray(base), out):
                return out
        return super().decode_expert(parts, base, dtype, key, row)  # which says what bits are wrong


CODEC = NOfMCodec
