"""Packed deltas as the kernels take them: the parts on disk as tensors, for all experts of a group at once.

    Ints       every entry a small integer times its group's scale                  int8 ... int1
    Kept       some entries of every row: their positions, and their values         drop, top, N:M, ternary, drop0.9+int4
    LowRank    left @ right                                                         rank
    Sum        one delta after another, in one fp32 addition                        int1+rank16

Positions are those of packing.py (Bitmap, EliasFano) or are drawn again from a key (Drawn). Values of Kept are bf16, or
Ints over the kept entries of a row. Nothing here is computed or copied: reference.decode says what each one means.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """D_0 ... D_{E-1}, each [out, in]."""

    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)"""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Every part."""

    def once(self, what: Hashable, make: Callable[[], Any]) -> Any:
        """What a backend works out from the parts before its first product, kept as long as this object lives."""
        if what not in self._made:
            self._made[what] = make()
        return self._made[what]


@dataclass(frozen=True, eq=False)
class Ints(Delta):
    """codes uint8 [E, out, bytes], packed by row (packing.py); scale bf16 [E, out, groups]."""

    codes: Tensor
    scale: Tensor
    bits: int
    group: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.codes.shape[:2], self.width)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale


@dataclass(frozen=True, eq=False)
class Drawn:
    """The k columns of a row with the largest draws under the expert's key; keys: E numbers below 2^64."""

    keys: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Bitmap:
    """bits uint8 [E, out, ceil(in / 8)]: bit c is set if column c is kept."""

    bits: Tensor


@dataclass(frozen=True, eq=False)
class EliasFano:
    """low uint8 [E, out, bytes] or None (no low bits), high uint8 [E, out, bytes]; column `in` is an unused slot."""

    low: Tensor | None
    high: Tensor


@dataclass(frozen=True, eq=False)
class Kept(Delta):
    """k entries of every row, in ascending order of their columns; values bf16 [E, out, k], or Ints of width k."""

    positions: Drawn | Bitmap | EliasFano
    values: Tensor | Ints
    width: int

    @property
    def kept(self) -> int:
        """k"""
        return self.values.shape[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.values.shape[:2], self.width)

    def tensors(self) -> tuple[Tensor, ...]:
        positions = tuple(part for part in vars(self.positions).values() if isinstance(part, Tensor))
        return positions + (self.values.tensors() if isinstance(self.values, Ints) else (self.values,))


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """left [E, out, r], right [E, r, in], floats."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.left.shape[:2], self.right.shape[2])

    def tensors(self) -> tuple[Tensor, ...]:
        return self.left, self.right


@dataclass(frozen=True, eq=False)
class Sum(Delta):
    """D = D_first + D_then."""

    first: Delta
    then: Delta

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.first.shape

    def tensors(self) -> tuple[Tensor, ...]:
        return self.first.tensors() + self.then.tensors()


@dataclass(frozen=True, eq=False)
class Projection:
    """One projection of a layer: base [out, in] and, unless every expert is the base, a delta."""

    base: Tensor
    delta: Delta | None
