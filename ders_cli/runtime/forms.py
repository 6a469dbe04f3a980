"""Which codec's delta product has a short way, one that doesn't make D; the others decode D or W (synthesis.py).

A form offers

    trainable                                  names of the parts that get gradients
    runs(projection, x, gradient)              whether the short way is open to this input
    product(projection, x, member, pieces)     [T, in] -> [T, out] = x @ D.T; pieces may be None: projection.piece(member)
    products(projection, x, members, counts)   the same for some members' rows of x, one member's after the other's; no gradient
    delta(projection, member, pieces)          D [out, in] fp32, from parts that are in memory wider than stored
    gradients(projection, member, pieces, g)   gradient g [out, in] fp32 to D -> those of the trainable parts

`pieces` are one member's parts by name. A codec that has no form has nothing to train but the base.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from ders_kernels.cpu_ops.short import each
from torch import Tensor

if TYPE_CHECKING:
    from .projection import DersProjection

Pieces = Mapping[str, Tensor]


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """[T, in], [out, in] -> [T, out]. For few bf16 tokens mm takes a tenth less time than linear (1.42, 1.57 ms of CPU)."""
    return torch.mm(x, matrix.t())


class Form(ABC):
    """See the module's text."""

    trainable: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def runs(self, projection: "DersProjection", x: Tensor, gradient: bool) -> bool: ...

    @abstractmethod
    def product(self, projection: "DersProjection", x: Tensor, member: int, pieces: Pieces | None) -> Tensor: ...

    def products(
        self, projection: "DersProjection", x: Tensor, members: Sequence[int], counts: Sequence[int]
    ) -> Tensor:
        return each(x, members, counts, lambda own, member: self.product(projection, own, member, None))

    def delta(self, projection: "DersProjection", member: int, pieces: Pieces) -> Tensor:
        raise AssertionError(f"{type(self).__name__} has nothing to train")

    def gradients(self, projection: "DersProjection", member: int, pieces: Pieces, g: Tensor) -> dict[str, Tensor]:
        return {}
