"""What stands between options and the walk: neurons brought into one order, a budget spent, codecs fitted to a text.

    source -> aligned source -> what its experts see of a text -> the budget's recipe -> encoder -> conversion

Without these options a conversion is what its recipe says, and nothing here costs anything.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DersError, UsageError
from .report import say

if TYPE_CHECKING:  # nothing heavy is imported until a command runs
    from .activations import Activations
    from .budget.limits import Limit
    from .budget.spend import Spent
    from .convert import Conversion
    from .output import Options
    from .recipe import Recipe
    from .source import Source


TOKENS = 4096


@dataclass(frozen=True)
class Choosing:
    """Options that decide, beside the recipe, how experts are stored."""

    budget: str | None = None  # 1.5bpw | 12GB
    max_loss: float | None = None  # the outputs' relative error
    candidates: tuple[str, ...] = ()  # terms of --delta that a budget chooses from; none: the usual ones
    align: bool = False
    calibrate: Path | None = None  # a text
    activations: Path | None = None  # what the experts see, instead of a text
    tokens: int | None = None  # of the text; None: TOKENS

    def __bool__(self) -> bool:
        return self != NOTHING

    def check(self) -> None:
        """Raise UsageError where options contradict each other."""
        if self.budget is not None and self.max_loss is not None:
            raise UsageError("--budget and --max-loss: expected one of the two")
        if self.calibrate is not None and self.activations is not None:
            raise UsageError("--calibrate and --activations: expected one of the two; both say what the experts see")
        for path, option in ((self.calibrate, "--calibrate"), (self.activations, "--activations")):
            if path is not None and not path.is_file():
                raise UsageError(f"{option} {path}: {'expected a file' if path.exists() else 'no such file'}")
        if self.tokens is not None and self.calibrate is None:
            raise UsageError("--tokens: says how much of --calibrate's text is used; there is none")
        self.limit()

    def limit(self) -> "Limit | None":
        """What may be spent, None: the recipe says it all. Raises UsageError."""
        from .budget.limits import most_error, parse_budget

        if self.budget is not None:
            return parse_budget(self.budget)
        return None if self.max_loss is None else most_error(self.max_loss)

    def inputs(self) -> list[Path]:
        """Files that are read."""
        return [path for path in (self.calibrate, self.activations) if path is not None]

    def ending(self, of_recipe: str) -> str:
        """What is added to a model's name: its recipe's own ending, or the budget's; and what was done to the experts."""
        if self.budget is not None:
            of_recipe = f"-ders-{''.join(self.budget.split())}"
        elif self.max_loss is not None:
            of_recipe = f"-ders-loss{self.max_loss:g}"
        return of_recipe + "-aligned" * self.align + "-calibrated" * bool(self.inputs())


NOTHING = Choosing()  # the recipe says it all


@contextmanager
def chosen(
    source: "Source", recipe: "Recipe", out: Path, options: "Options", choosing: Choosing, dry_run: bool
) -> "Iterator[tuple[Conversion, Spent | None]]":
    """The planned conversion, and what a budget bought. Raises DersError before a byte is written."""
    from . import convert
    from .base import make_base
    from .source import DersSource

    with ExitStack() as opened:
        base = None
        if not isinstance(source, DersSource):
            base = make_base(recipe.base, options.scratch)
            opened.callback(base.close)
        limit, spent, activations, encoder = choosing.limit(), None, None, None
        if choosing:  # what takes minutes comes after what can be refused at once
            convert.prepare(source, recipe, out, options, base)
            _refuse(source, recipe, choosing, limit)
        if choosing.activations:
            activations = opened.enter_context(_open(choosing.activations, source))
        if choosing.align:
            from .alignment import aligned_source

            source = aligned_source(source, options.jobs, options.quiet, base)
        if choosing.calibrate and dry_run:
            say("note: --dry-run does not run the model: errors and memory are those without --calibrate")
        elif choosing.calibrate:
            path = opened.enter_context(_collected(source, choosing, recipe.seed, options))
            activations = opened.enter_context(_open(path, source))
        if activations is not None:
            from .calibration import fits, make_encoder

            encoder = make_encoder(source, _fitted(recipe, limit), activations, options.quiet)
        prepare = partial(convert.prepare, source, out=out, options=options, base=base, encoder=encoder)
        if limit is not None:
            from .budget.spend import spend

            candidates = choosing.candidates or None
            spent = spend(
                source, base, recipe, limit, candidates, activations, options.jobs, quiet=options.quiet, prepare=prepare
            )
            recipe = spent.recipe
            if encoder is not None and not fits(source, recipe):
                say(
                    "note: the budget's plan has nothing that is fitted: what the experts see decided which codecs, not codes"
                )
                prepare = partial(prepare, encoder=None)
        yield prepare(recipe), spent


def _refuse(source: "Source", recipe: "Recipe", choosing: Choosing, limit: "Limit | None") -> None:
    """Raise UsageError for what would only show after minutes."""
    if limit is not None:
        from .budget.spend import check

        check(recipe, limit, choosing.candidates or None)
    if choosing.inputs():
        from .calibration import check_fits

        check_fits(source, _fitted(recipe, limit))


def _fitted(recipe: "Recipe", limit: "Limit | None") -> "Recipe":
    """What an encoder is made for. A budget's recipe is not known yet, and its plans count what ders.json says of the encoder."""
    return recipe if limit is None else recipe.model_copy(update={"delta": "int4", "rules": ()})


@contextmanager
def _collected(source: "Source", choosing: Choosing, seed: int, options: "Options") -> Iterator[Path]:
    """A file of what the experts see of the text, which the model is run on."""
    try:
        from .hf.collect import collect
    except ImportError as error:
        raise DersError(f"--calibrate needs transformers: pip install 'ders-cli[hf]' ({error})") from None
    with tempfile.TemporaryDirectory(prefix="ders-", dir=options.scratch) as folder:
        path = Path(folder) / "activations.safetensors"
        collect(source, choosing.calibrate, choosing.tokens or TOKENS, seed, path)
        yield path


@contextmanager
def _open(path: Path, source: "Source") -> "Iterator[Activations]":
    from .activations import Activations

    with Activations(path) as activations:
        activations.check(source.groups)
        yield activations
