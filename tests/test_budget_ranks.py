"""A budget for ranks against every allocation there is, and what it has to do with a soft threshold."""

import itertools

import numpy as np
import pytest

from ders_cli.budget.ranks import Spectrum, allocate, same_rank, threshold


def _spectra(rng: np.random.Generator, count: int, same_price: bool) -> list[Spectrum]:
    found = []
    for number in range(count):
        values = np.sort(rng.gamma(1, size=int(rng.integers(1, 5))))[::-1]
        shape = (8, 8) if same_price else (int(rng.integers(2, 12)), int(rng.integers(2, 12)))
        found.append(Spectrum(number, "up", "0", shape, values, float((values**2).sum()) * 1.1))
    return found


def _lost(spectra: list[Spectrum], ranks: tuple[int, ...]) -> float:
    left = sum(s.energy - (s.values[:r] ** 2).sum() for s, r in zip(spectra, ranks, strict=True))
    return left / sum(s.energy for s in spectra)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("same_price", [True, False])
def test_every_allocation_there_is(seed: int, same_price: bool) -> None:
    rng = np.random.default_rng(seed)
    spectra = _spectra(rng, int(rng.integers(1, 5)), same_price)
    ways = list(itertools.product(*(range(len(s.values) + 1) for s in spectra)))
    sizes = [sum(s.price * r for s, r in zip(spectra, way, strict=True)) for way in ways]
    last = 1.0
    for capacity in range(0, max(sizes) + 20, 7):
        found = allocate(spectra, capacity)
        best = min(_lost(spectra, way) for way, size in zip(ways, sizes, strict=True) if size <= capacity)
        assert found.bytes == sizes[ways.index(found.options)] <= capacity
        assert found.cost == pytest.approx(_lost(spectra, found.options))
        assert found.bound <= best + 1e-12 and found.cost >= best - 1e-12
        if same_price:
            assert found.exact and found.cost == pytest.approx(best, abs=1e-12)
            assert found.cost <= last + 1e-12  # more bytes, no more error
            last = found.cost
        assert not found.exact or found.cost == pytest.approx(best, abs=1e-12)


def test_equal_spectra_get_equal_ranks() -> None:
    spectra = [Spectrum(n, "up", "0", (8, 8), np.array([4.0, 3.0, 2.0, 1.0]), 30.0) for n in range(5)]
    assert allocate(spectra, 5 * 32 * 2).options == (2, 2, 2, 2, 2) == same_rank(spectra, 2).options
    assert allocate(spectra, 0).options == (0,) * 5 and allocate(spectra, 0).cost == 1


def test_what_is_left_goes_to_what_still_fits() -> None:
    """The next component by energy per byte does not fit, a cheaper matrix's does."""
    dear, cheap = (
        Spectrum(0, "up", "0", (30, 30), np.array([9.0, 8.0]), 145.0),
        Spectrum(1, "up", "0", (3, 3), np.array([1.0]), 1.0),
    )
    assert allocate([dear, cheap], 120 + 12).options == (1, 1)
    assert not allocate([dear, cheap], 120 + 11).options[1]


def test_the_threshold_is_the_soft_threshold_that_keeps_these_ranks() -> None:
    """X = U max(S - xi, 0) V^T minimises |D - X|^2 / 2 + xi |X|_*: |D - X|_2 <= xi and <X, D - X> = xi |X|_*, and its ranks are
    the budget's. Refitting the kept ranks to S (rankR does) leaves less error at the same ranks."""
    rng = np.random.default_rng(3)
    deltas = [rng.standard_normal((12, 12)) * scale for scale in (1.0, 0.5, 2.0)]
    spectra = []
    for number, delta in enumerate(deltas):
        spectra.append(
            Spectrum(number, "up", "0", (12, 12), np.linalg.svd(delta, compute_uv=False), float((delta**2).sum()))
        )
    found = allocate(spectra, 10 * 48)
    xi = threshold(spectra, found.options)
    for delta, rank in zip(deltas, found.options, strict=True):
        u, s, vt = np.linalg.svd(delta)
        shrunk = (u * np.maximum(s - xi, 0)) @ vt
        assert np.linalg.matrix_rank(shrunk, tol=1e-9) == rank
        assert np.linalg.norm(delta - shrunk, 2) <= xi * (1 + 1e-12)
        assert np.sum(shrunk * (delta - shrunk)) == pytest.approx(xi * np.linalg.norm(shrunk, "nuc"), abs=1e-9)
        refitted = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert np.linalg.norm(delta - refitted) <= np.linalg.norm(delta - shrunk)
    assert sum(found.options) == 10
