"""rankR: the delta as left @ right, its R largest singular directions. No gain: it would amplify these few directions."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.cpu_ops import floats, lowrank

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import DeltaCodec, NonFiniteError, Parts


@dataclass(frozen=True)
class RankCodec(DeltaCodec):
    """`left` [out, r] BF16, `right` [r, in] BF16, r = min(R, out, in). Encoding takes the whole matrix in memory."""

    rank: int
    name: ClassVar[str] = "rank"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"rank(\d+)")
    whole: ClassVar[frozenset[str]] = frozenset({"right"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"rank{self.rank}: expected rank1 or more")

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
        return {"left": TensorSpec((shape[0], r), "BF16"), "right": TensorSpec((r, shape[1]), "BF16")}

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        try:
            left, right = lowrank.factors(delta, min(self.rank, *delta.shape), key)
        except np.linalg.LinAlgError:  # products of the largest fp32 numbers overflow
            raise NonFiniteError(row, 0) from None
        return {"left": floats.narrow(left, "BF16"), "right": floats.narrow(right, "BF16")}

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        """Summed over the rank in order, in fp32: the same bits whatever the block, which BLAS does not promise."""
        left, right = floats.widen(parts["left"], "BF16"), floats.widen(parts["right"], "BF16")
        out = np.zeros(shape, np.float32)
        for r in range(left.shape[1]):
            out += left[:, r, None] * right[r]
        return out


CODEC = RankCodec
