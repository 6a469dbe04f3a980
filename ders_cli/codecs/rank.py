"""rankR: the delta as left @ right, its R largest singular directions. No gain: it would amplify these few directions.

Trained from the start it is DeRS-LM (arXiv 2503.01359, 3.4): `right` random, `left` zero, no scaling factor. The paper
does not name the distribution; it is LoRA's here, uniform in +-1/sqrt(in).
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.counter_rng import draw
from ders_kernels.cpu_ops import floats, lowrank

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import DeltaCodec, NonFiniteError, Parts, check_part_dtype

STEP_WEIGHTS = 1 << 17  # decoded at a time: 512 KB of fp32


@dataclass(frozen=True)
class RankCodec(DeltaCodec):
    """`left` [out, r], `right` [r, in], r = min(R, out, in), of `dtype`. Encoding takes the whole matrix in memory."""

    rank: int
    dtype: str = "BF16"
    name: ClassVar[str] = "rank"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"rank(\d{1,9})")
    whole: ClassVar[frozenset[str]] = frozenset({"right"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank{self.rank}: expected rank1 or more")
        check_part_dtype(self.dtype)

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "RankCodec":
        return cls(int(match[1]))

    @property
    def term(self) -> str:
        return f"rank{self.rank}"

    def block_rows(self, shape: tuple[int, int]) -> int:
        return shape[0]

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        r = min(self.rank, *shape)
        return {"left": TensorSpec((shape[0], r), self.dtype), "right": TensorSpec((r, shape[1]), self.dtype)}

    def initial(self, shape: tuple[int, int], key: int) -> Parts:
        """The parts that training starts from: a delta of 0."""
        r = min(self.rank, *shape)
        uniform = draw(key, 0, r * shape[1]).astype(np.float64) * 2.0**-31 - 1
        right = (uniform / np.sqrt(shape[1])).astype(np.float32).reshape(r, shape[1])
        left = np.zeros((shape[0], r), np.float32)
        return {"left": floats.narrow(left, self.dtype), "right": floats.narrow(right, self.dtype)}

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        try:
            left, right = lowrank.factors(delta, min(self.rank, *delta.shape), key)
        except np.linalg.LinAlgError:  # products of the largest fp32 numbers overflow
            raise NonFiniteError(row, 0) from None
        return {"left": floats.narrow(left, self.dtype), "right": floats.narrow(right, self.dtype)}

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        """Summed over the rank in order, in fp32: the same bits whatever the block, which BLAS does not promise."""
        left, right = floats.widen(parts["left"], self.dtype), floats.widen(parts["right"], self.dtype)
        out = np.zeros(shape, np.float32)
        lowrank.add_products(left, right, out)
        return out

    def decode_expert(self, parts: Parts, base: np.ndarray, dtype: str, key: int, row: int) -> np.ndarray:
        """In steps of some rows that a cache holds, so that the fp32 delta never stands in memory; the same bits."""
        left, right = floats.widen(parts["left"], self.dtype), floats.widen(parts["right"], self.dtype)
        expert, step = np.empty_like(base), max(1, STEP_WEIGHTS // max(1, base.shape[1]))
        delta = np.empty((step, base.shape[1]), np.float32)
        for first in range(0, base.shape[0], step):
            rows = slice(first, min(first + step, base.shape[0]))
            block = delta[: rows.stop - first]
            block.fill(0)
            lowrank.add_products(left[rows], right, block)
            expert[rows] = floats.synthesize(base[rows], block, dtype)
        return expert


CODEC = RankCodec
