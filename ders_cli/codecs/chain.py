"""a+b: b codes what a leaves to it.

After a codec that keeps entries (drop, top, N:M), b codes the kept values, a matrix [out, k] of its own:
`drop0.9+int4`. After any other, b codes the residual D - decode(a(D)): `int1+rank16`. Parts of b are named `then.*`.
b draws from the generator under the key + 1 (modulo 2^64).
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from ders_kernels.cpu_ops import floats

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import DeltaCodec, NonFiniteError, Parts, SelectiveCodec

_THEN = "then."
MOST = 16  # codecs in a chain: names of parts, and calls within calls, grow with each


def _next(key: int) -> int:
    return (key + 1) % 2**64


@dataclass(frozen=True)
class ChainCodec(DeltaCodec):
    """First a, then b on a's kept values or on its residual."""

    first: DeltaCodec
    then: DeltaCodec
    name: ClassVar[str] = "chain"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")  # made by `+`, not by a term

    def __post_init__(self) -> None:
        if self.first.lossless or self.then.lossless:
            raise UsageError(f"{self.term}: exact loses nothing, so there is nothing to chain")
        if isinstance(self.first, ChainCodec):  # parts of both would be named then.*
            raise UsageError(f"{self.term}: expected one codec, then what follows it; found a chain that comes first")
        codecs, rest = 2, self.then
        while isinstance(rest, ChainCodec):
            codecs, rest = codecs + 1, rest.then
        if codecs > MOST:
            raise UsageError(f"a chain of more than {MOST} codecs; expected a few, such as drop0.9+int4")

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "ChainCodec":
        raise AssertionError("a chain has no term")

    @property
    def term(self) -> str:
        return f"{self.first.term}+{self.then.term}"

    @property
    def config(self) -> dict[str, Any]:
        return {"codec": self.name, "first": self.first.config, "then": self.then.config}

    @property
    def whole(self) -> frozenset[str]:  # type: ignore[override]
        return self.first.whole | {_THEN + part for part in self.then.whole}

    def _inner_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return (shape[0], self.first.kept(shape[1])) if isinstance(self.first, SelectiveCodec) else shape

    def block_rows(self, shape: tuple[int, int]) -> int | None:
        return self.first.block_rows(shape) or self.then.block_rows(self._inner_shape(shape))

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        first = self.first.position_spec(shape) if isinstance(self.first, SelectiveCodec) else self.first.spec(shape)
        then = self.then.spec(self._inner_shape(shape))
        return first | {_THEN + part: spec for part, spec in then.items()}

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        if isinstance(self.first, SelectiveCodec):
            parts, rest = self.first.select(delta, key, row)
        else:
            parts = self.first.encode(delta, key, row)
            rest = delta - self.first.decode(parts, delta.shape, key, row)
        if floats.first_nonfinite(rest) >= 0 and (lost := np.isnan(rest).any(axis=1)).any():
            # gained or scaled past fp32, infinities lead to a NaN, in which integers would find a 0 to code
            raise NonFiniteError(row + int(lost.argmax()), 0)
        then = self.then.encode(rest, _next(key), row)
        return parts | {_THEN + part: data for part, data in then.items()}

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        inner = {part.removeprefix(_THEN): data for part, data in parts.items() if part.startswith(_THEN)}
        own = {part: data for part, data in parts.items() if not part.startswith(_THEN)}
        rest = self.then.decode(inner, (shape[0], self._inner_shape(shape)[1]), _next(key), row)
        if isinstance(self.first, SelectiveCodec):
            return self.first.scatter(own, rest, shape, key, row)
        return self.first.decode(own, shape, key, row) + rest


CODEC = ChainCodec
