"""A plan, one codec for each matrix of each expert, as few rules of a recipe.

    {(layer, projection, label): term} -> the commonest term as `delta`, and rules for the others

Cells of one term are joined first over layers (those where the same experts have it) or first over experts (those that have it in the
same layers), then over projections; of the two ways the one with fewer rules is taken. The rules never overlap, so their order
says nothing.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Cell = tuple[int, str, str]  # layer, projection, label of the expert
MOST_RANGES = 100  # in one rule: a value of a recipe has at most 1000 characters
PROJECTIONS = ("gate", "up", "down")


def compact(plan: Mapping[Cell, str]) -> tuple[str, list[dict[str, Any]]]:
    """The default term and the rules, as a recipe's YAML has them."""
    default = Counter(plan.values()).most_common(1)[0][0]  # the first of several
    everyone: dict[tuple[int, str], set[str]] = defaultdict(set)
    for layer, projection, label in plan:
        everyone[layer, projection].add(label)
    rules = []
    for term in dict.fromkeys(plan.values()):
        cells = [cell for cell, other in plan.items() if other == term != default]
        ways = [_joined_over_layers(cells), _joined_over_experts(cells)]
        rules += [(term, *block) for block in min(ways, key=len)]
    return default, [rule for block in rules for rule in _rules(*block, everyone)]


Block = tuple[tuple[int, ...], tuple[str, ...], tuple[str, ...]]  # layers, projections, labels: all their combinations


def _joined_over_layers(cells: Iterable[Cell]) -> list[Block]:
    experts: dict[tuple[int, str], list[str]] = defaultdict(list)
    for layer, projection, label in cells:
        experts[layer, projection].append(label)
    layers: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(list)
    for (layer, projection), labels in experts.items():
        layers[projection, tuple(labels)].append(layer)
    return _joined_over_projections((tuple(ls), p, labels) for (p, labels), ls in layers.items())


def _joined_over_experts(cells: Iterable[Cell]) -> list[Block]:
    layers: dict[tuple[str, str], list[int]] = defaultdict(list)
    for layer, projection, label in cells:
        layers[projection, label].append(layer)
    experts: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for (projection, label), numbers in layers.items():
        experts[projection, tuple(numbers)].append(label)
    return _joined_over_projections((numbers, p, tuple(labels)) for (p, numbers), labels in experts.items())


def _joined_over_projections(blocks: Iterable[tuple[tuple[int, ...], str, tuple[str, ...]]]) -> list[Block]:
    found: dict[tuple[tuple[int, ...], tuple[str, ...]], list[str]] = defaultdict(list)
    for layers, projection, labels in blocks:
        found[layers, labels].append(projection)
    return [(layers, tuple(projections), labels) for (layers, labels), projections in found.items()]


def _rules(
    term: str,
    layers: tuple[int, ...],
    projections: tuple[str, ...],
    labels: tuple[str, ...],
    everyone: Mapping[tuple[int, str], set[str]],
) -> Iterable[dict[str, Any]]:
    ranges = _ranges(sorted(set(layers)))
    for begin in range(0, len(ranges), MOST_RANGES):
        rule: dict[str, Any] = {"layers": ",".join(ranges[begin : begin + MOST_RANGES])}
        if set(projections) != set(PROJECTIONS):
            rule["projections"] = [p for p in PROJECTIONS if p in projections]
        if any(everyone[layer, projection] != set(labels) for layer in layers for projection in projections):
            numbers = sorted(int(label) for label in labels if label.isdecimal())
            rule["experts"] = [*_ranges(numbers), *(label for label in labels if not label.isdecimal())]
        yield rule | {"delta": term}


def _ranges(numbers: list[int]) -> list[str]:
    """[0, 1, 2, 5] -> ["0-2", "5"]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in found]
