"""The codec contract: what stands in for an expert's delta, and how it is written down.

A codec is a frozen dataclass; its fields are its configuration and, through `config`, its JSON. It arrives as one
file in this folder that offers its class as `CODEC`.

A matrix is handled in blocks of whole rows: encoding rows a..b on their own gives the same bytes as encoding the
whole. A codec that cannot promise this says so by `block_rows`. Every part has the matrix's rows as its first axis,
except the parts named in `whole`. Arithmetic is fp32; random choices are a function of (key, row, column).

    spec(shape)                        the parts of one [out, in] matrix: name -> TensorSpec
    encode(delta, key, row)            fp32 [rows, in] -> the parts of these rows; `row` is the first one's number
    decode(parts, shape, key, row)     parts of some rows -> fp32 [rows, in]

`encode_expert` and `decode_expert` wrap the two for stored bits. A codec that replaces them for bf16 by kernels that go from
bits to bits gives the same bytes (only `exact` has no other way).
"""

import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from ders_kernels.cpu_ops import floats, select

from ..checkpoint.tensor import FLOATS, TensorSpec
from ..errors import CheckpointError, UsageError

Parts = dict[str, np.ndarray]

# Values past fp32's range decode to none that is finite, and the walk says whose they are: numpy need not warn of them too.
_QUIET = partial(np.errstate, over="ignore", invalid="ignore")


class NonFiniteError(Exception):
    """A delta holds a NaN or an infinity at (row, column); the walk adds the tensor's name."""

    def __init__(self, row: int, column: int):
        super().__init__(row, column)
        self.row, self.column = row, column


@dataclass(frozen=True)
class DeltaCodec(ABC):
    """What every codec offers; see the module's text."""

    name: ClassVar[str]  # in config JSON
    pattern: ClassVar[re.Pattern[str]]  # one term of --delta
    lossless: ClassVar[bool] = False
    whole: ClassVar[frozenset[str]] = frozenset()  # parts that all rows share

    @classmethod
    @abstractmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "DeltaCodec":
        """The codec that one matched term of --delta asks for. Raises UsageError on a value out of range."""

    @property
    @abstractmethod
    def term(self) -> str:
        """The term of --delta that gives this codec, group size and dtype aside."""

    @property
    def config(self) -> dict[str, Any]:
        return {"codec": self.name, **asdict(self)}

    def block_rows(self, shape: tuple[int, int]) -> int | None:
        """Rows that must be encoded together, or None: any number."""
        return None

    @abstractmethod
    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]: ...

    @abstractmethod
    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts: ...

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray: ...

    def encode_expert(self, expert: np.ndarray, base: np.ndarray, dtype: str, key: int, row: int) -> Parts:
        """Stored bits [rows, in] of an expert and of its base -> parts. Raises NonFiniteError."""
        delta = floats.delta(expert, base, dtype)
        bad = floats.first_nonfinite(delta)
        if bad >= 0:
            raise NonFiniteError(row + bad // delta.shape[1], bad % delta.shape[1])
        with _QUIET():
            return self.encode(delta, key, row)

    def decode_expert(self, parts: Parts, base: np.ndarray, dtype: str, key: int, row: int) -> np.ndarray:
        """Parts and the base's stored bits [rows, in] -> the expert's stored bits: round(base + decoded delta)."""
        try:
            with _QUIET():
                return floats.synthesize(base, self.decode(parts, base.shape, key, row), dtype)
        except ValueError as error:  # packing names the row whose bits contradict themselves
            raise CheckpointError(str(error)) from None


@dataclass(frozen=True)
class SelectiveCodec(DeltaCodec):
    """A codec that keeps k entries of every row and stores their values; a chain codes those values further.

    Its parts are those of the positions and `values` [out, k] bf16.
    """

    @abstractmethod
    def kept(self, width: int) -> int:
        """Entries kept in a row of `width`."""

    @abstractmethod
    def position_spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]: ...

    @abstractmethod
    def select(self, delta: np.ndarray, key: int, row: int) -> tuple[Parts, np.ndarray]:
        """fp32 [rows, in] -> position parts and fp32 [rows, k], already scaled."""

    @abstractmethod
    def columns(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        """int32 [rows, k], ascending."""

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return self.position_spec(shape) | {"values": TensorSpec((shape[0], self.kept(shape[1])), "BF16")}

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        parts, values = self.select(delta, key, row)
        return parts | {"values": floats.narrow(values, "BF16")}

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        return self.scatter(parts, floats.widen(parts["values"], "BF16"), shape, key, row)

    def scatter(self, parts: Parts, values: np.ndarray, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        """fp32 values [rows, k] -> fp32 [rows, in], zeros elsewhere."""
        out = np.empty(shape, np.float32)
        select.scatter(self.columns(parts, shape, key, row), values, out)
        return out

    def decode_expert(self, parts: Parts, base: np.ndarray, dtype: str, key: int, row: int) -> np.ndarray:
        if dtype != "BF16":
            return super().decode_expert(parts, base, dtype, key, row)
        try:
            columns = self.columns(parts, base.shape, key, row)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        out = np.empty(base.shape, np.uint16)
        select.scatter_bf16(columns, parts["values"], np.ascontiguousarray(base), out)
        return out

    def settle(
        self, parts: Parts, ratios: np.ndarray, expert: np.ndarray, base: np.ndarray, key: int, row: int
    ) -> Parts:
        """`parts` of bf16 rows, those rows coded again by `encode` whose gain [rows] a compiled kernel left open (NaN)."""
        for i in np.flatnonzero(np.isnan(ratios)):
            one = DeltaCodec.encode_expert(self, expert[i : i + 1], base[i : i + 1], "BF16", key, row + int(i))
            for part, data in one.items():
                parts[part][i] = data[0]
        return parts


def check_part_dtype(dtype: str) -> None:
    """Raise UsageError unless float parts may be stored so."""
    if dtype not in FLOATS:
        raise UsageError(f"dtype {dtype!r:.40}: expected {', '.join(FLOATS)}")


def gain(delta: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The gain rule for kept values, row by row: fp32 [rows, in], [rows, k] -> fp32 [rows, 1] = sum(d^2) / sum(kept^2)."""
    ratios = np.empty(delta.shape[0], np.float32)
    select.gains(np.ascontiguousarray(delta), np.ascontiguousarray(kept), ratios)
    for i in np.flatnonzero(np.isnan(ratios)):  # too close to call: the order of the sums is fixed here
        one, few = delta[i : i + 1], kept[i : i + 1]
        energy, held = (np.einsum("ij,ij->i", rows, rows, dtype=np.float64) for rows in (one, few))
        ratios[i] = (energy / held)[0]
    return ratios[:, None]
