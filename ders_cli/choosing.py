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

if TYPE_CHECKING:  # nothing heavy is imported until a command runs
    from .activations import Activations
    from .budget.limits import Limit
    from .budget.spend import Spent
    from .convert import Conversion
    from .output import Options
    from .recipe import Recipe
    from .source import Source


@dataclass(frozen=True)
class Choosing:
    """Options that decide, beside the recipe, how experts are stored."""

    budget: str | None = None  # 1.5bpw | 12GB
    max_loss: float | None = None  # the outputs' relative error
    candidates: tuple[str, ...] = ()  # terms of --delta that a budget chooses from; none: the usual ones
    align: bool = False
    calibrate: Path | None = None  # a text
    activations: Path | None = None  # what the experts see, instead of a text
    tokens: int = 4096  # of the text

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
                raise UsageError(f"{option} {path}: no such file")
        self.limit()

    def limit(self) -> "Limit | None":
        """What may be spent, None: the recipe says it all. Raises UsageError."""
        from .budget.limits import most_error, parse_budget

        if self.budget is not None:
            return parse_budget(self.budget)
        return None if self.max_loss is None else most_error(self.max_loss)

    @property
    def ending(self) -> str | None:
        """What a budget adds to a model's name; None: there is none."""
        if self.budget is not None:
            return f"-ders-{''.join(self.budget.split())}"
        return None if self.max_loss is None else f"-ders-loss{self.max_loss:g}"


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
        if choosing:  # what takes minutes comes after what can be refused at once
            convert.prepare(source, recipe, out, options, base)
        if choosing.align:
            from .alignment import aligned_source

            source = aligned_source(source, options.jobs, options.quiet, base)
        limit, spent, activations, encoder = choosing.limit(), None, None, None
        if choosing.activations or (choosing.calibrate and not dry_run):  # a plan needs no run of the model
            from .calibration import fits, make_encoder

            activations = opened.enter_context(_activations(source, choosing, recipe.seed, options))
            # a budget's recipe is not known yet, and its plans count what ders.json says of the encoder
            fitted = recipe if limit is None else recipe.model_copy(update={"delta": "int4", "rules": ()})
            encoder = make_encoder(source, fitted, activations, options.quiet)
        prepare = partial(convert.prepare, source, out=out, options=options, base=base, encoder=encoder)
        if limit is not None:
            from .budget.spend import spend

            candidates = choosing.candidates or None
            spent = spend(
                source, base, recipe, limit, candidates, activations, options.jobs, quiet=options.quiet, prepare=prepare
            )
            recipe = spent.recipe
            if encoder is not None and not fits(source, recipe):
                prepare = partial(prepare, encoder=None)
        yield prepare(recipe), spent


@contextmanager
def _activations(source: "Source", choosing: Choosing, seed: int, options: "Options") -> "Iterator[Activations]":
    """What the experts see: of the file given, or of the text, which the model is run on."""
    from .activations import Activations

    with ExitStack() as opened:
        path = choosing.activations
        if path is None:
            try:
                from .hf.collect import collect
            except ImportError as error:
                raise DersError(f"--calibrate needs transformers: pip install 'ders-cli[hf]' ({error})") from None
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="ders-", dir=options.scratch))
            path = Path(folder) / "activations.safetensors"
            collect(source, choosing.calibrate, choosing.tokens, seed, path)
        activations = opened.enter_context(Activations(path))
        activations.check(source.groups)
        yield activations
