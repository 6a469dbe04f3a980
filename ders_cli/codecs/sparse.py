"""sparseP: a random share 1 - P of the whole matrix, as one list of values. No positions are stored.

DeRS-SM (arXiv 2503.01359, eq. 6): unique random flat positions, fixed, and a vector of values that is trained. Where
`drop` keeps at least one entry of every row, this keeps c = (1 - P) * in of a row on average, with c far below one if P
is .9999. Row r holds floor((r + 1) c + u) - floor(r c + u) entries, u in [0, 1) from the key, and of the row's
columns those with the largest draws: every entry is kept with the same probability 1 - P, a row can be found alone, and
the size is known beforehand.
"""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.cpu_ops import floats, select

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import DeltaCodec, Parts, check_part_dtype


@dataclass(frozen=True)
class SparseCodec(DeltaCodec):
    """`values` [n] of `dtype`, n = ceil(out * c), in ascending flat order; the last may be unused. Encoding takes the whole matrix."""

    rate: float
    dtype: str = "BF16"
    name: ClassVar[str] = "sparse"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"sparse(\d+(?:\.\d+)?|\.\d+)")
    whole: ClassVar[frozenset[str]] = frozenset({"values"})

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise UsageError(f"sparse{self.rate:g}: expected a share of 0 ... below 1, such as sparse0.99")
        check_part_dtype(self.dtype)

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "SparseCodec":
        return cls(float(match[1]))

    @property
    def term(self) -> str:
        return f"sparse{np.format_float_positional(self.rate, trim='-')}"

    def block_rows(self, shape: tuple[int, int]) -> int:
        return shape[0]

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {"values": TensorSpec((math.ceil(shape[0] * self._per_row(shape[1])),), self.dtype)}

    def initial(self, shape: tuple[int, int], key: int) -> Parts:
        """The parts that training starts from: zeros."""
        return {"values": floats.narrow(np.zeros(self.spec(shape)["values"].shape, np.float32), self.dtype)}

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        starts, columns = self._columns(delta.shape, key, row)
        values = np.zeros(self.spec(delta.shape)["values"].shape, np.float32)
        values[: columns.size] = delta[np.repeat(np.arange(delta.shape[0]), np.diff(starts)), columns]
        return {"values": floats.narrow(values * np.float32(1 / (1 - self.rate)), self.dtype)}

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        starts, columns = self._columns(shape, key, row)
        out = np.zeros(shape, np.float32)
        values = floats.widen(parts["values"][starts[0] : starts[-1]], self.dtype)
        out[np.repeat(np.arange(shape[0]), np.diff(starts)), columns] = values
        return out

    def flat_positions(self, shape: tuple[int, int], key: int) -> np.ndarray:
        """int64, ascending: row * in + column of each value of a whole matrix. One fewer than values where the last is unused."""
        starts, columns = self._columns(shape, key, 0)
        return np.repeat(np.arange(shape[0]) * shape[1], np.diff(starts)) + columns

    def _per_row(self, width: int) -> float:
        return (1 - self.rate) * width

    def _columns(self, shape: tuple[int, int], key: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(starts [rows + 1], columns [starts[-1] - starts[0]]): which of the matrix's values the rows hold, and where."""
        rows = np.arange(row, row + shape[0] + 1, dtype=np.float64)
        phase = (key >> 48) * 2.0**-16  # of few bits, so that the sum below never rounds up to the next integer
        starts = np.floor(rows * self._per_row(shape[1]) + phase).astype(np.int64)
        columns = np.empty(starts[-1] - starts[0], np.int64)
        select.largest_drawn(np.uint64(key), row, shape[1], starts, columns)
        return starts, columns


CODEC = SparseCodec
