"""What a budget buys, and what every kind of spending needs: a plan as a recipe, and the sizes of a curve."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..convert import Conversion
from ..errors import UsageError
from ..recipe import Recipe, make_recipe
from ..report import human_bytes, print_table
from ..source import Source
from .choice import Choice
from .limits import Limit
from .rules import compact

POINTS = 16  # of a curve

Prepare = Callable[[Recipe], Conversion]
Plan = dict[tuple[int, str, str], str]  # layer, projection, label -> term


@dataclass(frozen=True)
class Spent:
    """What a budget buys. predicted, curve and uniform: "delta_bytes", "bits_per_delta_weight" and "output_error" of a plan,
    of ranks "delta_error" where the other is null; of the chosen one "folder_bytes" too."""

    limit: Limit
    recipe: Recipe
    choice: Choice
    predicted: dict[str, Any]
    plan: list[dict[str, Any]]
    curve: list[dict[str, Any]]
    uniform: dict[str, dict[str, Any]]

    @property
    def gap(self) -> float:
        """What was minimised is at most by this share above the least that there is; 0: it is the least."""
        return self.choice.gap

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "budget": str(self.limit),
            "solver": "exact" if self.choice.exact else "within",
            "gap": self.gap if math.isfinite(self.gap) else None,
            "predicted": self.predicted,
            "plan": self.plan,
            "curve": self.curve,
            "uniform": self.uniform,
        }


def with_plan(recipe: Recipe, plan: Plan) -> Recipe:
    """The recipe with a codec for every cell, checked as a file would be."""
    default, rules = compact(plan) if plan else ("none", [])
    return make_recipe(recipe.model_dump() | {"delta": default, "rules": rules}, "the budget's recipe")


def capacity_of(budget: Limit, weights: int, fewest: int) -> int:
    """Delta bytes that a budget in bits allows. Raises UsageError below `fewest`."""
    capacity = math.floor(budget.amount * weights / 8)
    if capacity < fewest:
        bits = math.ceil(8e4 * fewest / weights) / 1e4
        raise UsageError(f"--budget {budget}: the smallest plan takes {bits:g}bpw; give it that or more")
    return capacity


def listed(source: Source, recipe: Recipe) -> list[dict[str, Any]]:
    """Every group's codecs, as the recipe gives them."""
    listed = []
    for group in source.groups:
        terms = [codec.term for codec in recipe.codecs(group)]
        experts = {label: term for (label, _), term in zip(group.members, terms, strict=True)}
        listed.append({"group": group.name, "layer": group.layer, "projection": group.projection, "experts": experts})
    return listed


def curve_sizes(first: int, last: int) -> list[int]:
    """POINTS sizes in equal ratios, both ends among them."""
    begin = max(1, first)
    sizes = [round(begin * (last / begin) ** (n / (POINTS - 1))) for n in range(POINTS)] if last > begin else [last]
    return list(dict.fromkeys([first, *(size for size in sizes[1:-1] if first < size < last), last]))


def print_curve(bought: dict[str, Any]) -> None:
    """Two tables of a `Spent.document`: the best plan of each size, the chosen one among them, and every candidate alone."""
    measure = "delta_error" if "delta_error" in bought["predicted"] else "output_error"
    header = ["", "bits/weight", "deltas", measure.replace("_", " ")]
    points = [("", point) for point in bought["curve"]] + [("chosen", bought["predicted"])]
    points.sort(key=lambda row: row[1]["delta_bytes"])
    rows = [_row(name, point, measure) for name, point in points]
    print_table(f"the best plans, budget {bought['budget']}", header, rows)
    print_table("one codec for all", header, [_row(term, point, measure) for term, point in bought["uniform"].items()])


def _row(name: str, point: dict[str, Any], measure: str) -> list[str]:
    size = human_bytes(point["delta_bytes"])
    return [name, f"{point['bits_per_delta_weight']:.3f}", size, f"{point[measure]:.3g}"]
