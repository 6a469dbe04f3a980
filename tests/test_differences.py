"""Errors of an expert: the same in any blocks of rows, right by plain numpy, and infinite where something is."""

import numpy as np
import pytest
from ders_kernels.cpu_ops import floats

from ders_cli.differences import Differences

STORAGE = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def _bits(random: np.random.Generator, shape: tuple[int, int], dtype: str, scale: float) -> np.ndarray:
    return floats.narrow(random.standard_normal(shape).astype(np.float32) * np.float32(scale), dtype)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("shape", [(1, 1), (7, 61), (130, 33)])
def test_as_numpy_says(dtype: str, shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    base, coded, original = (_bits(random, shape, dtype, scale) for scale in (1, 1.1, 0.9))
    whole = Differences()
    assert whole.add(original, coded, base, dtype)
    w, c, b = (floats.widen(bits, dtype).astype(np.float64) for bits in (original, coded, base))
    d = (w.astype(np.float32) - b.astype(np.float32)).astype(np.float64)
    k = (c.astype(np.float32) - b.astype(np.float32)).astype(np.float64)
    e = (c.astype(np.float32) - w.astype(np.float32)).astype(np.float64)
    expected = {
        "weight": np.linalg.norm(e) / np.linalg.norm(w),
        "delta": np.linalg.norm(e) / np.linalg.norm(d),
        "max_abs": abs(e).max(),
        "cosine": (w * c).sum() / np.linalg.norm(w) / np.linalg.norm(c),
        "kept": (d * k).sum() / (d * d).sum(),
    }
    for name, value in whole.errors().items():
        assert value == pytest.approx(expected[name], rel=1e-5), name  # six digits
    for step in (1, 3, 50):
        cut = Differences()
        for first in range(0, shape[0], step):
            rows = slice(first, first + step)
            cut.add(original[rows], coded[rows], base[rows], dtype)
        assert np.array_equal(cut._totals, whole._totals) and cut._worst == whole._worst


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(dtype: str, value: float) -> None:
    good = floats.narrow(np.ones((3, 5), np.float32), dtype)
    bad = floats.narrow(np.where(np.arange(15).reshape(3, 5) == 7, np.float32(value), np.float32(1)), dtype)
    for original, coded in ((good, bad), (bad, good), (bad, bad)):
        differing = Differences()
        assert differing.add(good, good, good, dtype) and not differing.add(original, coded, good, dtype)
        worst = {"weight": np.inf, "delta": np.inf, "max_abs": np.inf, "cosine": -np.inf, "kept": np.inf}
        assert not differing.finite and differing.errors() == worst  # so that no bound is kept
        differing.add(good, good, good, dtype)
        assert not differing.finite


def test_nothing_differs() -> None:
    bits = floats.narrow(np.zeros((2, 3), np.float32), "BF16")
    same = Differences()
    same.add(bits, bits, bits, "BF16")
    assert same.errors() == {"weight": 0, "delta": 0, "max_abs": 0, "cosine": 1, "kept": 1} and same.finite
