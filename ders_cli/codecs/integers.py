"""int8 ... int1: every entry as a small integer times its group's scale (formulas in ders_kernels.cpu_ops.ints)."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.counter_rng import draw
from ders_kernels.cpu_ops import ints
from ders_kernels.packing import code_bytes

from ..checkpoint.tensor import TensorSpec
from ..errors import UsageError
from .base import DeltaCodec, Parts


@dataclass(frozen=True)
class IntCodec(DeltaCodec):
    """`codes` [out, bytes] U8, codes of `bits` bits packed per row; `scale` [out, groups] BF16."""

    bits: int
    group_size: int
    name: ClassVar[str] = "int"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"int(\d{1,9})")

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError(f"int{self.bits}: expected int1 ... int8")
        if not 1 <= self.group_size <= 2**20:
            raise UsageError(f"group size {self.group_size}: expected 1 ... 1048576")

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "IntCodec":
        return cls(int(match[1]), group_size)

    @property
    def term(self) -> str:
        return f"int{self.bits}"

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, width = shape
        return {
            "codes": TensorSpec((rows, code_bytes(width, self.bits)), "U8"),
            "scale": TensorSpec((rows, -(-width // self.group_size)), "BF16"),
        }

    def _empty(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """uint8 codes and uint16 scale, to be written."""
        rows, width = shape
        codes = np.empty((rows, code_bytes(width, self.bits)), np.uint8)
        return codes, np.empty((rows, -(-width // self.group_size)), np.uint16)

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        rows, width = delta.shape
        drawn = self.bits <= 2
        draws = draw(key, row * width, rows * width if drawn else 0).reshape(rows if drawn else 0, width)
        codes, scale = self._empty(delta.shape)
        ints.encode(delta, draws, self.bits, self.group_size, codes, scale)
        return {"codes": codes, "scale": scale}

    def encode_expert(self, expert: np.ndarray, base: np.ndarray, dtype: str, key: int, row: int) -> Parts:
        if dtype != "BF16":
            return super().encode_expert(expert, base, dtype, key, row)
        codes, scale = self._empty(expert.shape)
        pair = np.ascontiguousarray(expert), np.ascontiguousarray(base)
        if self.bits >= 3:
            finite = ints.encode_stored(*pair, self.bits, self.group_size, codes, scale)
        else:
            finite = ints.encode_stored_signs(*pair, np.uint64(key), row, self.bits, self.group_size, codes, scale)
        # a NaN or an infinity: the long way says where
        return {"codes": codes, "scale": scale} if finite else super().encode_expert(expert, base, dtype, key, row)

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        out = np.empty(shape, np.float32)
        ints.decode(parts["codes"], parts["scale"], self.bits, self.group_size, out)
        return out

    def decode_expert(self, parts: Parts, base: np.ndarray, dtype: str, key: int, row: int) -> np.ndarray:
        if dtype != "BF16":
            return super().decode_expert(parts, base, dtype, key, row)
        out = np.empty(base.shape, np.uint16)
        ints.synthesize(parts["codes"], parts["scale"], self.bits, self.group_size, base, out)
        return out


CODEC = IntCodec
