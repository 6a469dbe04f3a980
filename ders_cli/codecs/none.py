"""none: no delta at all. Every expert comes back as the base; what a layer that stays dense needs, and the zero to compare with."""

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..checkpoint.tensor import TensorSpec
from .base import DeltaCodec, Parts


@dataclass(frozen=True)
class NoneCodec(DeltaCodec):
    """No parts."""

    name: ClassVar[str] = "none"
    pattern: ClassVar[re.Pattern[str]] = re.compile(r"none")

    @classmethod
    def from_term(cls, match: re.Match[str], group_size: int) -> "NoneCodec":
        return cls()

    @property
    def term(self) -> str:
        return "none"

    def spec(self, shape: tuple[int, int]) -> dict[str, TensorSpec]:
        return {}

    def encode(self, delta: np.ndarray, key: int, row: int) -> Parts:
        return {}

    def decode(self, parts: Parts, shape: tuple[int, int], key: int, row: int) -> np.ndarray:
        return np.zeros(shape, np.float32)


CODEC = NoneCodec
