"""exact: the expert's own bits, at the entropy of its difference from the base (about 1.6 bits per weight).

The difference is counted in steps of the stored dtype and coded in the context of the base's exponent; the stream's
bytes are spelled out in ders_kernels.exact_format. Any bits come back: -0, infinities, every NaN. A chunk is about a
million weights in whole rows with tables of its own; where coding saves nothing it holds the raw bits.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels import exact_format

from ..checkpoint.tensor import TensorSpec
from ..errors import CheckpointError
from .base import DeltaCodec, Parts

CHUNK_WEIGHTS = 1 << 20
EXPONENT_SHIFT = {"BF16": 7, "F16": 10, "F32": 23}


@dataclass(frozen=True)
class ExactCodec(DeltaCodec):
    """`extents` [chunks, 2] I64: begin and end of each chunk in `stream` U8, which all experts of a group share."""

    name: ClassVar[str] = "exact"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"exact")
    lossless: ClassVar[bool] = True

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "ExactCodec":
        return cls()

    @property
    def term(self) -> str:
        return "exact"

    def block_rows(self, shape: tuple[int, int]) -> int:
        """Rows of a chunk."""
        return max(1, CHUNK_WEIGHTS // max(1, shape[1]))

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"extents": TensorSpec((-(-shape[0] // self.block_rows(shape)), 2), "I64"), "stream": None}

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        raise AssertionError("exact codes bits, not fp32 deltas: encode_expert")

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        raise AssertionError("exact codes bits, not fp32 deltas: decode_expert")

    def encode_expert(self, expert: np.ndarray, base: np.ndarray, dtype: str, key: int, row: int) -> Parts:
        """Stored bits of one chunk of rows -> {"stream"}; the walk keeps the extents."""
        chunk = exact_format.encode_chunk(expert.reshape(-1), base.reshape(-1), EXPONENT_SHIFT[dtype])
        return {"stream": np.frombuffer(chunk, np.uint8)}

    def decode_expert(self, parts: Parts, base: np.ndarray, dtype: str, key: int, row: int) -> np.ndarray:
        try:
            bits = exact_format.decode_chunk(parts["stream"], base.reshape(-1), EXPONENT_SHIFT[dtype])
        except exact_format.CorruptStream as error:
            raise CheckpointError(f"rows {row} ... {row + base.shape[0] - 1}: {error}") from None
        return bits.reshape(base.shape)


CODEC = ExactCodec
