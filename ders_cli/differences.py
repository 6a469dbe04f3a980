"""What a coded expert differs from its original by, gathered block by block."""

import math

import numpy as np
from ders_kernels.cpu_ops import floats, sums


class Differences:
    """Sums over the rows of one expert, in fp64 and in the rows' order: the same however the rows came in blocks."""

    def __init__(self) -> None:
        self._totals, self._worst = np.zeros(len(sums.NAMES)), np.float32(0)

    def add(self, original: np.ndarray, coded: np.ndarray, base: np.ndarray, dtype: str) -> bool:
        """Stored bits [rows, in] of the next rows of the expert, of what stands for it, and of the base; whether all are
        finite."""
        rows, worst = np.empty((original.shape[0] + 1, len(sums.NAMES))), np.empty(original.shape[0], np.float32)
        rows[0] = self._totals
        if dtype == "BF16":
            sums.differences_bf16(original, coded, base, rows[1:], worst)
        else:
            sums.differences(*(floats.widen(bits, dtype) for bits in (original, coded, base)), rows[1:], worst)
        with np.errstate(invalid="ignore", over="ignore"):
            self._totals = np.add.reduce(rows, axis=0)  # row after row
            self._worst = np.maximum(self._worst, worst.max(initial=0))  # a NaN stays
        return bool(np.isfinite(rows[1:]).all())

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self._totals).all() and np.isfinite(self._worst))

    def errors(self) -> dict[str, float]:
        """To six digits; at their worst, infinite, where a NaN or an infinity was met.

        weight, delta: |W' - W| relative to |W| and to |D|; max_abs; cosine of W' and W; kept: <D', D> / |D|^2, what is
        left of the delta's size (1: all of it).
        """
        if not self.finite:
            return dict.fromkeys(("weight", "delta", "max_abs"), math.inf) | {"cosine": -math.inf, "kept": math.inf}
        weight, delta, error, kept, cross, coded = self._totals.tolist()
        found = {
            "weight": math.sqrt(_ratio(error, weight, 0)),
            "delta": math.sqrt(_ratio(error, delta, 0)),
            "max_abs": float(self._worst),
            "cosine": _ratio(cross, math.sqrt(weight * coded), 1),
            "kept": _ratio(kept, delta, 1),
        }
        return {name: float(f"{value:.5e}") for name, value in found.items()}


def _ratio(a: float, b: float, empty: float) -> float:
    return a / b if b > 0 else (empty if a == 0 else math.inf)
