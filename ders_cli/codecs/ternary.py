"""ternaryK: an unbiased sample of the share K of every row, one value and one sign bit each (ders_kernels.cpu_ops.ternary).

At K = .01 about 0.1 bit per weight. The larger an entry, the likelier it is kept, so the sample is far better than a
random drop of the same share.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from ders_kernels.counter_rng import draw
from ders_kernels.cpu_ops import ternary
from ders_kernels.packing import code_bytes, pack_positions, position_bytes, unpack_positions

from ..checkpoint.tensor import TensorSpec
from ..errors import CheckpointError, UsageError
from .base import DeltaCodec, NonFiniteError, Parts


@dataclass(frozen=True)
class TernaryCodec(DeltaCodec):
    """Positions as `low` and `high` (unused slots say column `in`); `negative` [out, bytes] U8, a bit each; `scale` [out, 1] BF16."""

    density: float
    name: ClassVar[str] = "ternary"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"ternary(\d+(?:\.\d+)?|\.\d+)")

    def __post_init__(self) -> None:
        if not 0 < self.density <= 0.5:
            raise UsageError(f"ternary{self.density:g}: expected a share above 0 ... 0.5, such as ternary0.02")

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "TernaryCodec":
        return cls(float(match[1]))

    @property
    def term(self) -> str:
        return f"ternary{np.format_float_positional(self.density, trim='-')}"

    def slots(self, width: int) -> int:
        """Entries that a row of `width` has room for."""
        return max(1, round(self.density * width))

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        rows, n = shape[0], self.slots(shape[1])
        sizes = position_bytes(n, shape[1], unused=True) | {"negative": code_bytes(n, 1)}
        return {part: TensorSpec((rows, size), "U8") for part, size in sizes.items()} | {
            "scale": TensorSpec((rows, 1), "BF16")
        }

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        columns, negative, scale = self._room(delta.shape)
        ternary.encode(np.ascontiguousarray(delta), draw(key, row, delta.shape[0]), columns, negative, scale[:, 0])
        return self._packed(columns, negative, scale, delta.shape[1], row)

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        columns = self._columns(parts, shape, row)
        negative = np.unpackbits(parts["negative"], axis=1, count=columns.shape[1], bitorder="little")
        out = np.empty(shape, np.float32)
        ternary.decode(columns, negative, parts["scale"][:, 0], out)
        return out

    def encode_expert(self, expert: np.ndarray, base: np.ndarray, dtype: str, key: int, row: int) -> Parts:
        if dtype == "BF16":
            columns, negative, scale = self._room(expert.shape)
            pair, draws = (np.ascontiguousarray(expert), np.ascontiguousarray(base)), draw(key, row, expert.shape[0])
            if ternary.encode_bf16(*pair, draws, columns, negative, scale[:, 0]):
                return self._packed(columns, negative, scale, expert.shape[1], row)
        return super().encode_expert(expert, base, dtype, key, row)  # which says where it is not finite

    def decode_expert(self, parts: Parts, base: np.ndarray, dtype: str, key: int, row: int) -> np.ndarray:
        if dtype != "BF16":
            return super().decode_expert(parts, base, dtype, key, row)
        try:
            columns = self._columns(parts, base.shape, row)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        out = np.empty(base.shape, np.uint16)
        ternary.decode_bf16(columns, parts["negative"], parts["scale"][:, 0], np.ascontiguousarray(base), out)
        return out

    def _room(self, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        columns = np.empty((shape[0], self.slots(shape[1])), np.int32)
        return columns, np.empty(columns.shape, np.uint8), np.empty((shape[0], 1), np.uint16)

    def _packed(self, columns: np.ndarray, negative: np.ndarray, scale: np.ndarray, width: int, row: int) -> Parts:
        if (scale >= 0x7F80).any():  # mean|d| / density is past bf16
            raise NonFiniteError(row + int((scale >= 0x7F80).argmax()), 0)
        signs = np.packbits(negative, axis=1, bitorder="little")
        return pack_positions(columns, width, unused=True) | {"negative": signs, "scale": scale}

    def _columns(self, parts: Parts, shape: tuple[int, int], row: int) -> np.ndarray:
        positions = {part: parts[part] for part in ("low", "high") if part in parts}
        return unpack_positions(positions, self.slots(shape[1]), shape[1], unused=True, first_row=row)


CODEC = TernaryCodec
