"""The knapsack against every choice there is, and the bound that the greedy solver states."""

import itertools
import math

import numpy as np
import pytest

from ders_cli.budget import choice
from ders_cli.budget.choice import Item, best_within, fewest_bytes, least_bytes, least_cost


def _random_items(rng: np.random.Generator, count: int, most: int, unit: int = 1, whole: bool = False) -> list[Item]:
    """Options in no order, with ties, useless ones and items that have only one."""
    items = []
    for _ in range(count):
        options = int(rng.integers(1, most + 1))
        sizes = unit * rng.integers(0, 40, options)
        costs = rng.integers(0, 12, options) if whole else rng.gamma(1.0, size=options)
        items.append(Item(tuple(map(int, sizes)), tuple(map(float, costs))))
    return items


def _all(items: list[Item]) -> list[tuple[int, float, tuple[int, ...]]]:
    ways = itertools.product(*(range(len(item.sizes)) for item in items))
    return [(_size(items, way), _cost(items, way), way) for way in ways]


def _size(items: list[Item], way: tuple[int, ...]) -> int:
    return sum(item.sizes[k] for item, k in zip(items, way, strict=True))


def _cost(items: list[Item], way: tuple[int, ...]) -> float:
    return math.fsum(item.costs[k] for item, k in zip(items, way, strict=True))


def _stated(items: list[Item], found: choice.Choice) -> None:
    assert found.bytes == _size(items, found.options) and found.cost == _cost(items, found.options)


@pytest.mark.parametrize("seed", range(40))
def test_least_cost_is_the_least(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = _random_items(rng, int(rng.integers(1, 6)), 5, unit=int(rng.choice([1, 7, 192])), whole=seed % 2 == 0)
    ways = _all(items)
    between = np.linspace(fewest_bytes(items), max(size for size, _, _ in ways), 6).astype(int)
    for capacity in (*map(int, between), 10**9):
        found = least_cost(items, capacity)
        best = min(cost for size, cost, _ in ways if size <= capacity)
        _stated(items, found)
        assert found.bytes <= capacity and found.cost == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert found.exact and found.gap == 0
        if seed % 2 == 0:  # whole costs, whose sums have no rounding: of equally cheap choices a smallest one
            assert found.bytes == min(size for size, cost, _ in ways if cost == best)


@pytest.mark.parametrize("seed", range(40))
def test_least_bytes_are_the_least(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    items = _random_items(rng, int(rng.integers(1, 6)), 5, unit=int(rng.choice([1, 7, 192])), whole=seed % 2 == 0)
    ways = _all(items)
    costs = sorted({cost for _, cost, _ in ways})
    for limit in (costs[0], costs[len(costs) // 3] * (1 + 1e-9), costs[-1] + 1):
        found = least_bytes(items, limit)
        _stated(items, found)
        assert found.cost <= limit and found.exact
        assert found.bytes == min(size for size, cost, _ in ways if cost <= limit)


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_where_nothing_is_exact(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of a few cells: sizes are rounded up to a coarse unit, and the choice is still within its limit and bound."""
    monkeypatch.setattr(choice, "CELLS", 60)
    monkeypatch.setattr(choice, "COARSE", [1e-3, 10][seed % 2])  # the programme left out, and taken for what it is
    rng = np.random.default_rng(200 + seed)
    items = _random_items(rng, 6, 5)
    ways = _all(items)
    for capacity in (fewest_bytes(items) + 13, fewest_bytes(items) + 55):
        found, best = least_cost(items, capacity), min(cost for size, cost, _ in ways if size <= capacity)
        assert found.bytes <= capacity and found.bound <= best * (1 + 1e-9) and best <= found.cost * (1 + 1e-9)
        assert found.gap == 0 if found.exact else found.cost == pytest.approx(found.bound * (1 + found.gap))
        assert not found.exact or found.cost == pytest.approx(best)
        small, least = least_bytes(items, best), min(size for size, cost, _ in ways if cost <= best)
        assert small.cost <= best and small.bound <= least <= small.bytes
        assert not small.exact or small.bytes == least


def test_many_items_come_near_the_bound() -> None:
    """10,000 matrices with a dozen codecs each, as a large model has: within 0.01 % of the linear bound."""
    rng = np.random.default_rng(5)
    bits = np.array([0.06, 0.13, 0.21, 0.4, 0.55, 1.1, 2.1, 3.1, 4.1, 8.1, 2.0])
    rows = rng.integers(1, 5, 10_000) * 4096
    noise = np.append(0.3 / bits[:5], 4.0 ** -bits[5:10])
    items = []
    for row in rows:
        costs = rng.gamma(0.5) * np.append(noise * rng.uniform(0.8, 1.25, 10), 0.0)
        sizes = (bits * row * 1024 / 8).astype(int)
        sizes[-1] = int(sizes[-1] * rng.uniform(0.7, 1.6))
        items.append(Item(tuple(map(int, sizes)), tuple(map(float, costs))))
    smallest, largest = fewest_bytes(items), sum(max(item.sizes) for item in items)
    for share in (0.01, 0.1):
        capacity = int(smallest + share * (largest - smallest))
        found = least_cost(items, capacity)
        assert found.bytes <= capacity and 0 <= found.gap < 1e-4
        assert least_bytes(items, found.cost).bytes <= capacity * (1 + 1e-4)


def test_ties_go_to_fewer_bytes_then_to_the_earlier_option() -> None:
    items = [Item((4, 2, 2), (1.0, 1.0, 1.0)), Item((3, 5), (2.0, 1.0))]
    assert least_cost(items, 100).options == (1, 1)
    assert best_within(items, 100, 0).options == (1, 1)
    assert least_bytes(items, 3.0).options == (1, 0)


def test_what_is_required() -> None:
    items = [Item((1, 2, 3), (9.0, 4.0, 1.0), (0, 1, 2)) for _ in range(3)]
    found = best_within(items, 9, 3)
    assert sorted(found.options) == [1, 2, 2] and found.cost == 6  # all of 3 bytes would cost 3
    assert best_within(items, 9, 0).options == (2, 2, 2)
    with pytest.raises(ValueError, match="no choice"):
        best_within(items, 5, 3)  # 1 + 2 + 3


def test_too_small_a_capacity_is_refused() -> None:
    items = [Item((4, 2), (1.0, 3.0))] * 2
    with pytest.raises(ValueError, match="the least is 4"):
        least_cost(items, 3)
    with pytest.raises(ValueError, match="the least is 2.0"):
        least_bytes(items, 1.9)
