"""`--budget B --delta rank`: every matrix gets the rank that ranks.py gives it, none where that is 0."""

import math
from functools import partial
from typing import Any

from ..base import Base
from ..errors import UsageError
from ..recipe import Recipe
from ..source import Source
from .choice import Choice
from .folder import within_folder
from .limits import Limit
from .ranks import allocate, same_rank, spectra_of, threshold
from .spent import Plan, Prepare, Spent, capacity_of, curve_sizes, listed, with_plan

UNIFORM = (1, 2, 4, 8, 16, 32, 64, 128)


def spend_ranks(
    source: Source,
    base: Base | None,
    recipe: Recipe,
    budget: Limit,
    jobs: int,
    seed: int,
    quiet: bool,
    prepare: Prepare,
) -> Spent:
    """As spend.spend, within bits or bytes. Raises UsageError where no rank can be told apart."""
    weights = sum(math.prod(group.shape) * len(group.members) for group in source.groups)

    def plan(choice: Choice) -> Plan:
        return {
            (s.layer, s.projection, s.label): f"rank{r}" if r else "none"
            for s, r in zip(spectra, choice.options, strict=True)
        }

    def folder(choice: Choice) -> int:
        return prepare(with_plan(recipe, plan(choice))).totals()["output_bytes"]

    def point(choice: Choice) -> dict[str, Any]:
        bits = 8 * choice.bytes / weights
        errors = {"output_error": None, "delta_error": math.sqrt(choice.cost)}
        return {"delta_bytes": choice.bytes, "bits_per_delta_weight": bits} | errors

    if budget.kind == "bits":
        capacity = capacity_of(budget, weights, 0)
    else:
        capacity = int(budget.amount) - prepare(with_plan(recipe, {})).totals()["output_bytes"]
    spectra = spectra_of(source, base, max(0, capacity), seed, jobs, quiet)
    if len({(s.layer, s.projection, s.label) for s in spectra}) < len(spectra):
        raise UsageError(
            "--delta rank: two layers of this model have one number, so no rule tells them apart; use --delta rankR"
        )
    solve = partial(allocate, spectra)
    choice = solve(capacity) if budget.kind == "bits" else within_folder(int(budget.amount), 0, solve, folder)
    chosen = with_plan(recipe, plan(choice))
    predicted = point(choice) | {"threshold": threshold(spectra, choice.options), "folder_bytes": folder(choice)}
    each = sum(spectrum.price for spectrum in spectra)
    deepest = max(len(spectrum.values) for spectrum in spectra)
    uniform = {f"rank{r}": point(same_rank(spectra, r)) for r in UNIFORM if r <= deepest}
    curve = [point(solve(size)) for size in curve_sizes(each // 4, deepest * each)]
    return Spent(budget, chosen, choice, predicted, listed(source, chosen), curve, uniform)
