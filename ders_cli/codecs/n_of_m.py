"""N:M: keep the N entries of largest magnitude of every M consecutive inputs (2:4 is what sparse tensor cores take).

Ties go to the lower column; a tail of t < M inputs keeps min(N, t). The gain rule then restores the row's size.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.cpu_ops import select

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import Parts, SelectiveCodec, gain


@dataclass(frozen=True)
class NOfMCodec(SelectiveCodec):
    """`bitmap` [out, ceil(in / 8)] U8, bit c set if column c is kept; `values` [out, k] BF16."""

    n: int
    m: int
    name: ClassVar[str] = "n:m"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"(\d+):(\d+)")

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
        columns = np.empty((delta.shape[0], self.kept(delta.shape[1])), np.int32)
        select.largest_of_blocks(select.magnitudes(delta), self.n, self.m, columns)
        bits = np.zeros(delta.shape, np.uint8)
        np.put_along_axis(bits, columns, 1, axis=1)
        values = np.take_along_axis(delta, columns, axis=1)
        return {"bitmap": np.packbits(bits, axis=1, bitorder="little")}, values * gain(delta, values)

    def columns(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        bits = np.unpackbits(parts["bitmap"], axis=1, bitorder="little")
        tail = -shape[1] % self.m
        in_blocks = np.pad(bits[:, : shape[1]], ((0, 0), (0, tail))).reshape(shape[0], -1, self.m).sum(axis=2)
        expected = np.full(in_blocks.shape[1], self.n)
        expected[-1] = min(self.n, self.m - tail)
        bad = (in_blocks != expected).any(axis=1) | bits[:, shape[1] :].any(axis=1)
        if bad.any():
            raise ValueError(f"row {row + int(bad.argmax())}: bitmap does not keep {self.n} of every {self.m}")
        return np.nonzero(bits)[1].reshape(shape[0], -1).astype(np.int32)


CODEC = NOfMCodec
