"""Figures with numpy arrays in them as few bytes: `u32 length, JSON, arrays`, then gzip, then base64 for a page.

An array is {"$": [type, first byte, rows, columns]} in the JSON, its bytes stand behind, little-endian, each at a multiple of
4. Small ones are f4 as they are; large ones u1, in 254 steps from `low` to `high` (255: no number), which costs 0.2 % of the
range. rows -1: one axis.
"""

import base64
import gzip
import json
import math
from typing import Any

import numpy as np

EXACT = 1 << 15  # numbers of an array up to which they stay as they are
STEPS, NONE = 254, 255


class Packer:
    """Collects arrays while the figures are turned into what JSON can say."""

    def __init__(self) -> None:
        self._arrays = bytearray()

    def packed(self, value: Any) -> Any:
        """`value` with a reference for each array, and null for what is no number."""
        if isinstance(value, dict):
            return {key: self.packed(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.packed(item) for item in value]
        if isinstance(value, np.ndarray):
            return self._array(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def _array(self, value: np.ndarray) -> dict[str, Any]:
        if value.size <= EXACT:
            return self._append("f4", value.astype("<f4"))
        codes, low, high = quantised(value)
        return self._append("u1", codes) | {"low": low, "high": high}

    def _append(self, kind: str, data: np.ndarray) -> dict[str, Any]:
        at = len(self._arrays)
        self._arrays += data.tobytes() + b"\0" * (-data.nbytes % 4)
        rows, columns = data.shape if data.ndim == 2 else (-1, data.size)
        return {"$": [kind, at, rows, columns]}

    def whole(self, document: Any) -> bytes:
        """The packed document and its arrays."""
        text = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        return len(text).to_bytes(4, "little") + text + bytes(self._arrays)


def quantised(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """fp [...] -> u1 codes, low, high: value = low + (high - low) / 254 * code; 255 where there is no finite number."""
    finite = np.isfinite(values)
    known = values[finite].astype(np.float64)
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    codes = np.full(values.shape, NONE, np.uint8)
    codes[finite] = np.round((known - low) * (STEPS / (high - low))) if high > low else 0
    return codes, low, high


def for_page(data: bytes) -> str:
    """gzip and base64: letters that end no element. The same bytes give the same text."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()
