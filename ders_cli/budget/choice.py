"""The multiple-choice knapsack: for every item one of its options, so that all costs together are least within a capacity.

    minimise  sum_i cost[i, k_i]   so that   sum_i bytes[i, k_i] <= capacity

Two solvers (Kellerer, Pferschy, Pisinger: Knapsack Problems, chapter 11):

- *greedy*: the steps of every item's lower convex hull in order of cost saved per byte until the next one does not fit, which
  with a share of that step is the optimum of the linear relaxation, hence the **bound**: no choice costs less. What is left
  is then filled with whatever saves most. O(n K log nK).
- *exact*: a dynamic programme over bytes in units of the sizes' greatest common divisor, one byte of memory for each item
  and unit. Where that passes CELLS, sizes are rounded up to a coarser unit: never too large, but no longer exact; with
  more than some 250 items the greedy choice is better then, and the programme is left out.

`least_cost` and `least_bytes` return the better of the two with its bound, and say whether it is proven best. Ties go to fewer bytes, then
to the earlier option, so the same numbers give the same choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CELLS = 1 << 26  # most of the dynamic programme's table: 64 MB, some 2 s on one core with a dozen options
COARSE = 1e-3  # where rounding up to the unit may waste more of the capacity than this, greedy is better
ROUNDING = 1e-12  # of sums of costs that were added in different orders


@dataclass(frozen=True)
class Item:
    """The options of one item: bytes and finite costs. `marks`: for each option the bits that it contributes to what is required."""

    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    marks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Choice:
    """options[i] is the place of item i's option. `bound`: no choice is better by the measure that was minimised."""

    options: tuple[int, ...]
    bytes: int
    cost: float
    bound: float
    exact: bool  # proven best
    gap: float  # found / bound - 1: at most so far from the best; 0 where exact


def fewest_bytes(items: Sequence[Item]) -> int:
    """The least that any choice takes."""
    return sum(min(item.sizes) for item in items)


def least_cost(items: Sequence[Item], capacity: int) -> Choice:
    """The cheapest choice of at most `capacity` bytes. Raises ValueError below `fewest_bytes`."""
    sizes, costs = _tables(items)
    if capacity < fewest_bytes(items):
        raise ValueError(f"{capacity} bytes; the least is {fewest_bytes(items)}")
    taken, bound = _greedy(sizes, costs, capacity)
    choice = _choice(items, taken, bound, _cost(items, taken) <= bound * (1 + ROUNDING))
    if choice.exact:
        return choice
    if _unit(items, capacity)[1] > COARSE:
        return choice
    table = Programme(items, capacity)
    other = _filled(sizes, costs, table.options(table.within), capacity)
    if table.exact or _cost(items, other) < choice.cost:
        return _choice(items, other, bound, table.exact)
    return choice


def least_bytes(items: Sequence[Item], most_cost: float) -> Choice:
    """The smallest choice that costs at most `most_cost`. Raises ValueError where none costs so little."""
    sizes, costs = _tables(items)
    if (least := math.fsum(min(item.costs) for item in items)) > most_cost:
        raise ValueError(f"cost {most_cost}; the least is {least}")
    # a hair less: sums in another order may differ in their last bits, and the limit is one
    taken, bound = _greedy(costs, sizes.astype(np.float64), most_cost * (1 - ROUNDING))
    choice = _choice(items, taken, math.ceil(bound - 1e-6), False, of_bytes=True)
    if choice.bytes <= choice.bound:
        return _choice(items, taken, choice.bytes, True, of_bytes=True)
    if _unit(items, choice.bytes)[1] > COARSE:
        return choice
    table = Programme(items, choice.bytes)
    units = np.flatnonzero(table.costs <= most_cost)
    if len(units):
        other = table.options(int(units[0]))
        if _cost(items, other) <= most_cost and (table.exact or _bytes(items, other) < choice.bytes):
            return _choice(items, other, choice.bound, table.exact, of_bytes=True)
    return choice


def best_within(items: Sequence[Item], capacity: int, required: int) -> Choice:
    """The cheapest choice whose options' marks together hold all bits of `required`: a rule such as "at least one of 3 bits".

    Raises ValueError where no choice within `capacity` does. Exact; for small problems, as there is no other way.
    """
    if capacity < fewest_bytes(items) or not math.isfinite((table := Programme(items, capacity, required)).costs[-1]):
        raise ValueError(f"no choice of at most {capacity} bytes has what is required")
    taken = table.options(table.within)
    return _choice(items, taken, _cost(items, taken), table.exact)


def frontier(items: Sequence[Item], capacities: Sequence[int]) -> list[Choice]:
    """The greedy choice at each of several capacities, none below `fewest_bytes`: what a curve needs."""
    sizes, costs = _tables(items)
    steps, found = hull_steps(sizes, costs), []
    for capacity in capacities:
        taken, bound = _greedy(sizes, costs, capacity, steps)
        found.append(_choice(items, taken, bound, _cost(items, taken) <= bound * (1 + ROUNDING)))
    return found


class Programme:
    """The dynamic programme: the least cost within 0 ... `within` units above the smallest options, and how to get there.

    One pass over the items; least[mark, u] is the least cost of the items so far that hold the bits `mark` within u units.
    """

    def __init__(self, items: Sequence[Item], capacity: int, required: int = 0):
        marks = required + 1
        unit, wasted = _unit(items, capacity, marks)
        self.exact = wasted == 0
        self._units = [[-(-(size - min(item.sizes)) // unit) for size in item.sizes] for item in items]
        self._marks, self._required = [item.marks or (0,) * len(item.sizes) for item in items], required
        self.within = min((capacity - fewest_bytes(items)) // unit, sum(map(max, self._units)))
        widest = max(len(item.sizes) for item in items) * marks
        self._taken = np.zeros((len(items), marks, self.within + 1), np.min_scalar_type(widest))
        least = np.full((marks, self.within + 1), np.inf)
        least[0] = 0
        for number, item in enumerate(items):
            least = self._add(number, item, least)
        self.costs = least[required]  # [within + 1], falling

    def _add(self, number: int, item: Item, before: np.ndarray) -> np.ndarray:
        """The table with one more item."""
        least = np.full_like(before, np.inf)
        for k in sorted(range(len(item.sizes)), key=lambda k: (item.sizes[k], k)):
            units = self._units[number][k]
            if units > self.within:
                continue
            for held in range(self._required + 1):
                mark = (held | self._marks[number][k]) & self._required
                costs = before[held, : self.within + 1 - units] + item.costs[k]
                better = costs < least[mark, units:]
                np.copyto(least[mark, units:], costs, where=better)
                # the option, and what was held before it
                np.copyto(self._taken[number, mark, units:], k * (self._required + 1) + held, where=better)
        return least

    def options(self, within: int) -> np.ndarray:
        """int64 [n]: the options of the cheapest choice within so many units, with the fewest that reach this cost."""
        at = int(np.searchsorted(-self.costs, -self.costs[within], side="left"))
        mark, options = self._required, np.empty(len(self._units), np.int64)
        for number in reversed(range(len(options))):
            options[number], mark = divmod(int(self._taken[number, mark, at]), self._required + 1)
            at -= self._units[number][options[number]]
        return options


def _unit(items: Sequence[Item], capacity: int, marks: int = 1) -> tuple[int, float]:
    """The bytes that the programme counts as one, and the share of the capacity that rounding up to them may waste."""
    unit = math.gcd(*(size - min(item.sizes) for item in items for size in item.sizes)) or 1
    room = min(capacity, sum(max(item.sizes) for item in items)) - fewest_bytes(items)
    most = max(1, CELLS // (len(items) * marks) - 1)
    if room // unit <= most:
        return unit, 0.0
    return -(-room // most), len(items) / most


def lower_hull(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Places of the options on the lower convex hull of one item, from the smallest to the cheapest."""
    hull: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda k: (sizes[k], costs[k], k)):
        if not math.isfinite(costs[k]) or not math.isfinite(sizes[k]) or (hull and costs[k] >= costs[hull[-1]]):
            continue
        while len(hull) > 1 and _slope(sizes, costs, hull[-2], hull[-1]) <= _slope(sizes, costs, hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _slope(sizes: Sequence[float], costs: Sequence[float], a: int, b: int) -> float:
    """Cost saved per byte from option a to option b."""
    return (costs[a] - costs[b]) / (sizes[b] - sizes[a])


@dataclass(frozen=True)
class Steps:
    """The hulls' steps in the order in which they pay: item, option that is reached, bytes more, cost saved."""

    first: np.ndarray  # int64 [n]: every item's smallest option
    item: np.ndarray
    option: np.ndarray
    sizes: np.ndarray
    saved: np.ndarray


def hull_steps(sizes: np.ndarray, costs: np.ndarray) -> Steps:
    """Steps of all items, [n, K] each; those of one item stay in their order, as its slopes fall."""
    hulls = [lower_hull(s, c) for s, c in zip(sizes.tolist(), costs.tolist(), strict=True)]
    rows = [(i, a, b, n) for i, hull in enumerate(hulls) for n, (a, b) in enumerate(zip(hull, hull[1:], strict=False))]
    item, a, b, place = np.array(rows, np.int64).reshape(-1, 4).T
    more, saved = sizes[item, b] - sizes[item, a], costs[item, a] - costs[item, b]
    order = np.lexsort((place, item, -(saved / more)))
    return Steps(np.array([hull[0] for hull in hulls]), item[order], b[order], more[order], saved[order])


def _greedy(
    sizes: np.ndarray, costs: np.ndarray, capacity: float, steps: Steps | None = None
) -> tuple[np.ndarray, float]:
    """Options [n] of the greedy choice, filled, and the linear relaxation's cost. `sizes` may be any measure that is limited."""
    steps = steps or hull_steps(sizes, costs)
    rows = np.arange(len(sizes))
    room = capacity - sizes[rows, steps.first].sum()
    used = np.cumsum(steps.sizes)
    fit = int(np.searchsorted(used, room, side="right"))
    taken = steps.first.copy()
    taken[steps.item[:fit]] = steps.option[:fit]  # of several steps of one item the last stays
    bound = costs[rows, steps.first].sum() - steps.saved[:fit].sum()
    if fit < len(used):
        bound -= steps.saved[fit] * (room - (used[fit - 1] if fit else 0)) / steps.sizes[fit]
    return _filled(sizes, costs, taken, capacity), float(max(bound, 0.0))


def _filled(sizes: np.ndarray, costs: np.ndarray, taken: np.ndarray, capacity: float) -> np.ndarray:
    """Change one item after another to the option that saves most cost of those that fit, until none does."""
    taken, rows = taken.copy(), np.arange(len(sizes))
    while True:
        room = capacity - sizes[rows, taken].sum()
        saved = costs[rows, taken][:, None] - costs
        saved[sizes - sizes[rows, taken][:, None] > room] = 0
        best = int(saved.argmax())
        if saved.flat[best] <= 0:
            return taken
        taken[best // sizes.shape[1]] = best % sizes.shape[1]


def _tables(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [n, K] and costs [n, K]; where an item has fewer options, ones that are never taken."""
    width = max(len(item.sizes) for item in items)
    sizes, costs = np.full((len(items), width), np.iinfo(np.int64).max // 4), np.full((len(items), width), np.inf)
    for i, item in enumerate(items):
        sizes[i, : len(item.sizes)], costs[i, : len(item.costs)] = item.sizes, item.costs
    return sizes, costs


def _choice(items: Sequence[Item], taken: np.ndarray, bound: float, exact: bool, of_bytes: bool = False) -> Choice:
    size, cost = _bytes(items, taken), _cost(items, taken)
    found = size if of_bytes else cost
    if exact:
        return Choice(tuple(map(int, taken)), size, cost, found, True, 0.0)
    return Choice(tuple(map(int, taken)), size, cost, bound, False, found / bound - 1 if bound > 0 else math.inf)


def _bytes(items: Sequence[Item], taken: np.ndarray) -> int:
    return sum(item.sizes[k] for item, k in zip(items, taken, strict=True))


def _cost(items: Sequence[Item], taken: np.ndarray) -> float:
    return math.fsum(item.costs[k] for item, k in zip(items, taken, strict=True))
