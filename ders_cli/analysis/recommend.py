"""From a verdict and predicted numbers to a recipe, and the sentence that says why.

A lossy codec is recommended where, of the whole model, the predicted output error |y' - y| / |y| is at most BOUND as root mean
square over all experts and layers, and at most WORST times that of any one, and where at least KEPT of the deltas' size is
left: a code that shrinks the deltas takes all experts back to the base, and costs far more than its error says. Of those that
were tried, the one that takes the fewest bytes, if these are fewer than those of `exact`. `none` is recommended only of copies
with noise, by the same two bounds. docs/analyze.md tells how the bound was found.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .verdict import GroupFacts, Verdict, in_ranges

BOUND, WORST, KEPT = 0.01, 2.0, 0.95
# what is tried where nothing is asked for: codecs that keep the deltas' size
LIGHT = ("ternary0.02", "ternary0.05", "drop0.9+int4", "int1", "int2", "int4")
WORTH = 0.95  # of the source's bytes that an output folder takes at most, to be worth the trouble


@dataclass(frozen=True)
class Cost:
    """What a codec would make of the whole model; NaN where an error is not known."""

    delta_bytes: int | None
    folder_bytes: int | None
    output_error: float
    worst_output_error: float
    kept: float

    @property
    def near(self) -> bool:
        """It keeps the model what it is, by the rule above."""
        return _within((self.output_error, self.worst_output_error)) and self.kept >= KEPT


@dataclass(frozen=True)
class BaseFound:
    """A base that was compared. label: as ders.json says it; recipe: as a recipe takes it."""

    label: str
    recipe: str
    relative_norm: float
    exact_bytes: int | None


@dataclass(frozen=True)
class Recommendation:
    """recipe: keys and values that recipe.make_recipe takes; None: keep the model."""

    recipe: dict[str, Any] | None
    says: str


def recommend(
    verdict: Verdict,
    groups: Sequence[GroupFacts],
    costs: Mapping[str, Cost],
    bases: Sequence[BaseFound],
    source_bytes: int,
    settings: Mapping[str, Any],
    of_none: tuple[float, float] = (math.nan, math.nan),
) -> Recommendation:
    """`costs` by the codec's term; `settings`: what else the recipe says (seed, group_size, shared), kept as it is;
    `of_none`: |y_base - y| / |y|, root mean square and worst of the experts; NaN where it is not known.
    """
    kind = verdict.kind
    if kind == "permuted":
        says = "First bring the neurons into one order: `ders compress MODEL --align`. Lossless first, then look again."
        return Recommendation(_recipe("exact", "mean", [], settings), says)
    if kind == "native":
        return Recommendation(None, "Keep the model as it is.")
    if kind == "copies":
        base = _best_exact(bases)
        says = "exact: every copy comes back bit for bit, and takes nearly no bytes beside the base."
        return Recommendation(_recipe("exact", base.recipe, [], settings), says)
    rules = _rules(verdict, groups)
    if kind == "noisy copies" and _within(of_none):
        says = (
            "none: the mean of the copies alone. Their differences are noise, and a mean averages it away; outputs change by "
            f"{of_none[0]:.2g} of their size."
        )
        return Recommendation(_recipe("none", "mean", rules, settings), says)
    found = _by_numbers(costs, bases, rules, source_bytes, settings)
    return replace(found, says=f"{found.says} {_without(of_none)}") if kind == "noisy copies" else found


def _within(errors: tuple[float, float]) -> bool:
    """Errors of outputs, root mean square and worst; unknown ones are not."""
    return errors[0] <= BOUND and errors[1] <= WORST * BOUND


def _without(of_none: tuple[float, float]) -> str:
    if math.isnan(of_none[0]):
        return "What the mean of the copies alone (none) would change is not known."
    return (
        f"The mean of the copies alone (none) would change outputs by {of_none[0]:.2g} of their size (worst expert "
        f"{of_none[1]:.2g}): if you know that this is noise, take it."
    )


def _by_numbers(
    costs: Mapping[str, Cost],
    bases: Sequence[BaseFound],
    rules: list[dict[str, Any]],
    source_bytes: int,
    settings: Mapping[str, Any],
) -> Recommendation:
    lossy, best = {term: cost for term, cost in costs.items() if term != "exact"}, _best_exact(bases)
    near, exact = (
        {term: cost for term, cost in lossy.items() if cost.near},
        _with_base(costs.get("exact"), bases[0], best),
    )
    light = [term for term, cost in near.items() if _worth(cost, source_bytes) and _lighter(cost, exact)]
    if light:
        term = min(light, key=lambda term: costs[term].delta_bytes)
        says = (
            f"{term}: the lightest codec whose predicted output error, {costs[term].output_error:.2g}, is at most {BOUND:g}; "
            f"the folder would take {costs[term].folder_bytes / source_bytes:.0%} of the model's bytes."
        )
        return Recommendation(_recipe(term, "mean", rules, settings), says)
    if exact is None or not _worth(exact, source_bytes):
        return Recommendation(None, "Keep the model as it is: no codec is both light and near enough.")
    says = (
        f"exact: {_why_exact(lossy, near)}, and nothing is lost this way; the folder would take "
        f"{exact.folder_bytes / source_bytes:.0%} of the model's bytes."
    )
    return Recommendation(_recipe("exact", best.recipe, [], settings), says)


def _why_exact(lossy: Mapping[str, Cost], near: Mapping[str, Cost]) -> str:
    if near:
        return f"no lossy codec of those tried whose predicted output error is at most {BOUND:g} takes fewer bytes"
    known = [cost.output_error for cost in lossy.values() if cost.kept >= KEPT and math.isfinite(cost.output_error)]
    least = f" (the least predicted is {min(known):.2g})" if known else ", as far as is known"
    return f"no lossy codec of those tried keeps the output error at {BOUND:g} or below{least}"


def _with_base(exact: Cost | None, chosen: BaseFound, best: BaseFound) -> Cost | None:
    """`exact` with the base that suits it best, instead of the chosen one."""
    if exact is None or exact.folder_bytes is None or chosen.exact_bytes is None:
        return exact
    return replace(exact, folder_bytes=exact.folder_bytes - chosen.exact_bytes + best.exact_bytes)


def _lighter(cost: Cost, exact: Cost | None) -> bool:
    return exact is None or exact.folder_bytes is None or cost.folder_bytes < exact.folder_bytes


def _worth(cost: Cost, source_bytes: int) -> bool:
    return cost.folder_bytes is not None and cost.folder_bytes <= WORTH * source_bytes


def _best_exact(bases: Sequence[BaseFound]) -> BaseFound:
    """The base with which `exact` takes least; the first of equals: the first base is the one that was asked for."""
    return min(bases, key=lambda base: math.inf if base.exact_bytes is None else base.exact_bytes)


def _rules(verdict: Verdict, groups: Sequence[GroupFacts]) -> list[dict[str, Any]]:
    """`exact` for the groups that are not as the model is: copies, what is not finite, and what is too far from the others."""
    odd: dict[int, list[str]] = {}
    for group in groups:
        if verdict.of_groups[group.name] != verdict.kind:
            odd.setdefault(group.layer, []).append(group.projection)
    by_projections: dict[tuple[str, ...], list[int]] = {}
    for layer, projections in odd.items():
        by_projections.setdefault(tuple(dict.fromkeys(projections)), []).append(layer)
    whole = tuple(dict.fromkeys(group.projection for group in groups))
    return [
        {"layers": in_ranges(layers)}
        | ({} if projections == whole else {"projections": list(projections)})
        | {"delta": "exact"}
        for projections, layers in by_projections.items()
    ]


def _recipe(term: str, base: str, rules: list[dict[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {"base": base, "delta": term, **settings}
    return recipe | ({"rules": rules} if rules else {})
