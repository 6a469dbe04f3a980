"""A budget's main road: weigh every codec on every matrix, choose within the budget, lay out, write a recipe.

    measure.py -> choice.py -> rules.py -> plan.make_plan: does the folder fit? if not, less is spent (folder.py)

What is minimised is the mean square of the experts' relative output errors, |y' - y| / |y| on sampled hidden states, every matrix coded
alone and their energies added; its square root is the *predicted output error*, root mean square over layers and experts. It
ranks codecs whose error has no direction. A codec that shrinks the delta (largest entries, low rank, none) pulls every
layer the same way, which no such number shows; so these are no candidates (docs/budget.md).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import Base
from ..codecs import DeltaCodec, parse_codec
from ..codecs.chain import ChainCodec
from ..codecs.drop import DropCodec
from ..codecs.integers import IntCodec
from ..codecs.ternary import TernaryCodec
from ..convert import Conversion
from ..errors import UsageError
from ..output import Options
from ..plan import make_plan
from ..recipe import Recipe
from ..source import Source
from .choice import Choice, fewest_bytes, frontier, least_bytes, least_cost
from .folder import within_folder
from .limits import Limit
from .low_rank import spend_ranks
from .measure import Cell, measure
from .spent import Plan, Prepare, Spent, capacity_of, curve_sizes, listed, with_plan

if TYPE_CHECKING:
    from ..activations import Activations

# Which of them are good depends on the deltas: ternary where most of a delta is zero, as after short training in bf16, drop+int
# where it is more like Gaussian noise (docs/budget.md).
CANDIDATES = (
    *("exact", "int8", "int6", "int4", "int3", "int2", "int1"),
    *(
        "drop0.5+int1",
        "drop0.75+int1",
        "drop0.9+int4",
        "drop0.9+int2",
        "drop0.9+int1",
        "drop0.95+int1",
        "drop0.98+int1",
    ),
    *("ternary0.5", "ternary0.2", "ternary0.1", "ternary0.05", "ternary0.02", "ternary0.01", "ternary0.005"),
)
RANK = "rank"  # as the only candidate: every matrix gets a rank of its own


def spend(
    source: Source,
    base: Base | None,
    recipe: Recipe,
    budget: Limit,
    candidates: Sequence[str] | None = None,
    activations: "Activations | None" = None,
    jobs: int = 1,
    seed: int | None = None,
    quiet: bool = True,
    prepare: Prepare | None = None,
) -> Spent:
    """The best plan within `budget`: `recipe` with a codec for every matrix.

    source, base: of the conversion; base None where the source is a DeRS checkpoint that brings its own. candidates: terms of
    --delta, or ("rank",). seed: of hidden states and sampled rows (the recipe's, unless given). prepare: plans the conversion of
    a recipe as it will be run, so that every byte counts; without it one of default options. Raises UsageError where the budget
    is below the smallest plan, or the error out of reach.
    """
    codecs = check(recipe, budget, candidates)
    prepare, seed = prepare or _preparation(source, base, jobs), recipe.seed if seed is None else seed
    prepare(with_plan(recipe, {}))  # what can be refused is refused before the pass
    if not codecs:
        return spend_ranks(source, base, recipe, budget, jobs, seed, quiet, prepare)
    cells = measure(source, base, codecs, seed, activations, jobs, quiet)
    folder = partial(_folder, recipe, cells, prepare)
    choice = _choose(cells, budget, folder)
    chosen = with_plan(recipe, _plan(cells, choice))
    predicted = _point(cells, choice.bytes, choice.cost) | {"folder_bytes": folder(choice)}
    return Spent(budget, chosen, choice, predicted, listed(source, chosen), _curve(cells), _uniform(cells, codecs))


def check(recipe: Recipe, budget: Limit, candidates: Sequence[str] | None = None) -> list[DeltaCodec]:
    """The candidates' codecs, none for ranks. Raises UsageError for what no model can be given."""
    if recipe.rules:
        raise UsageError("a budget chooses every matrix's codec: leave the recipe's rules out")
    if not candidates or tuple(candidates) != (RANK,):
        return usable(candidates or CANDIDATES, recipe.group_size)
    if budget.kind == "error":
        raise UsageError(
            "--max-loss: low rank shrinks deltas, so no predicted error says what it costs; give it a --budget"
        )
    return []


def usable(candidates: Sequence[str], group_size: int) -> list[DeltaCodec]:
    """The candidates' codecs. Raises UsageError for one whose errors cannot be weighed against the others'."""
    codecs = [parse_codec(term, group_size) for term in candidates]
    for codec in codecs:
        if not _keeps_size(codec):
            raise UsageError(
                f"--budget: {codec.term} changes the size of deltas, and no predicted error says what that costs; choose among "
                "exact, int8 ... int1, dropP, ternaryK and dropP+intN (or rank alone)"
            )
    return list({codec.term: codec for codec in codecs}.values())


def _keeps_size(codec: DeltaCodec) -> bool:
    if isinstance(codec, ChainCodec):
        return isinstance(codec.first, DropCodec) and isinstance(codec.then, IntCodec)
    return codec.lossless or isinstance(codec, IntCodec | DropCodec | TernaryCodec)


def _preparation(source: Source, base: Base | None, jobs: int) -> Prepare:
    options = Options(jobs)

    def prepare(recipe: Recipe) -> Conversion:
        named = recipe if base is None else recipe.model_copy(update={"base": base.label})
        return Conversion(source, named, base, make_plan(source, named, base, options.max_shard_bytes), Path(), options)

    return prepare


def _choose(cells: Sequence[Cell], budget: Limit, folder: Callable[[Choice], int]) -> Choice:
    items = [cell.item for cell in cells]
    if budget.kind == "error":
        least = math.sqrt(math.fsum(min(item.costs) for item in items))
        if least > budget.amount:
            raise UsageError(f"--max-loss {budget.amount:g}: the candidates reach {least:.3g}; add exact to them")
        return least_bytes(items, budget.amount**2)
    fewest = fewest_bytes(items)
    if budget.kind == "bits":
        return least_cost(items, capacity_of(budget, sum(cell.weights for cell in cells), fewest))
    return within_folder(int(budget.amount), fewest, partial(least_cost, items), folder)


def _folder(recipe: Recipe, cells: Sequence[Cell], prepare: Prepare, choice: Choice) -> int:
    """Bytes of the whole output: as planned, with exact streams as they were counted instead of their bound."""
    plan = _plan(cells, choice)
    conversion = prepare(with_plan(recipe, plan))
    streams = sum(cell.stream for cell in cells if plan[cell.layer, cell.projection, cell.label] == "exact")
    layout = conversion.plan
    # the index of several shards names all bytes of weights, and totals() those without streams
    digits = len(str(layout.weight_bytes + streams)) - len(str(layout.weight_bytes)) if len(layout.shards) > 1 else 0
    return conversion.totals()["output_bytes"] - layout.stream_bound + streams + digits


def _plan(cells: Sequence[Cell], choice: Choice) -> Plan:
    return {
        (cell.layer, cell.projection, cell.label): list(cell.options)[k]
        for cell, k in zip(cells, choice.options, strict=True)
    }


def _point(cells: Sequence[Cell], size: int, cost: float) -> dict[str, Any]:
    weights = sum(cell.weights for cell in cells)
    return {"delta_bytes": size, "bits_per_delta_weight": 8 * size / weights, "output_error": math.sqrt(cost)}


def _curve(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The best plans from the smallest to the most exact one."""
    items = [cell.item for cell in cells]
    last = least_bytes(items, math.fsum(min(item.costs) for item in items)).bytes
    return [_point(cells, c.bytes, c.cost) for c in frontier(items, curve_sizes(fewest_bytes(items), last))]


def _uniform(cells: Sequence[Cell], codecs: Sequence[DeltaCodec]) -> dict[str, dict[str, Any]]:
    """Every candidate for all matrices, where it can be used for all."""
    found = {}
    for term in (codec.term for codec in codecs):
        if all(term in cell.found for cell in cells):
            sizes, costs = zip(*(cell.found[term] for cell in cells), strict=True)
            found[term] = _point(cells, sum(sizes), math.fsum(costs))
    return found
