"""Dense -> MoE: as base and deltas to be trained, as base and coded deltas of fine-tunes, or as a stock MoE in full."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from ders_kernels.cpu_ops import floats

from . import convert
from .checkpoint.tensor import FLOATS, STORAGE
from .codecs import DeltaCodec
from .codecs.none import NoneCodec
from .codecs.rank import RankCodec
from .codecs.sparse import SparseCodec
from .donors import FineTune
from .output import Options, refuse_occupied
from .plain import planned_plain, write_plain
from .recipe import Recipe, make_recipe
from .report import shown
from .upcycled import AncestorBase, UpcycledSource


def prepare_deltas(
    source: UpcycledSource, delta: str | None, group_size: int, out: Path, options: Options
) -> convert.Conversion:
    """The conversion that writes base and deltas; `delta` None: the adapters' own factors, of their largest rank."""
    if delta is None:
        codecs = [source.codec_of(group) for group in source.groups]
        ranks = [codec.rank for codec in codecs if isinstance(codec, RankCodec)]
        delta = f"rank{max(ranks)}" if ranks else "none"
    recipe = make_recipe({"delta": delta, "group_size": group_size, "seed": source.seed})
    return convert.prepare(source, recipe, out, options, AncestorBase(source))


def prepare_full(source: UpcycledSource, out: Path, options: Options) -> dict[str, Any]:
    """Refuse what can be refused; the bytes of N copies of everything."""
    make_recipe({"delta": "none", "seed": source.seed})
    refuse_occupied(out, options, *source.folders, addresses=[source.reader.address])
    return planned_plain(source)


def write_full(source: UpcycledSource, out: Path, options: Options) -> None:
    """Write N copies of everything: a stock MoE. `prepare_full` comes first."""
    mark = convert.fingerprint(source, Recipe(delta="none", seed=source.seed), options)
    write_plain(source, out, options, mark, f"writing {out.name}")


def counts(source: UpcycledSource, codecs: dict[str, DeltaCodec] | None) -> dict[str, int | None]:
    """Parameters of the `dense` model, and those `added`: deltas, routers and what else is new. `codecs` None: full copies.

    DeRS-SM adds N (1 - p) F + router, DeRS-LM N r sum(d_in + d_out) L + router (arXiv 2503.01359, Tables 1 to 4). A coded
    delta has no parameters to count: None.
    """
    dense = sum(spec.size for spec in source.reader.tensors.values())
    if codecs is None:
        return {"dense": dense, "added": sum(spec.size for spec in source.plan.tensors.values()) - dense}
    if not all(isinstance(codec, (NoneCodec, RankCodec, SparseCodec)) for codec in codecs.values()):
        return {"dense": dense, "added": None}
    deltas = sum(
        len(group.members) * sum(spec.size for spec in codecs[group.name].spec(group.shape).values())
        for group in source.groups
    )
    return {"dense": dense, "added": deltas + sum(spec.size for spec in source.plan.made.values())}


def left_out(source: UpcycledSource, quiet: bool) -> list[dict[str, Any]]:
    """What each fine-tune's other weights differ in from the dense model's: an expert holds its FFN alone.

    Per donor: `tensors` that differ, out of `of`, and `relative`, the Frobenius norm of the difference by that of the weights
    (None where one of them is not finite).
    """
    names = source.others
    fine_tunes = [donor for donor in source.donors if isinstance(donor, FineTune)]
    total, found = sum(source.copied[name].nbytes for name in names) * len(fine_tunes), []
    with shown("comparing the fine-tunes' other weights", total, quiet) as progress:
        for donor in fine_tunes:
            differing, error, size = 0, 0.0, 0.0
            for name in names:
                dtype, same = source.copied[name].dtype, True
                for mine, theirs in zip(source.reader.chunks(name), donor.reader.chunks(name), strict=True):
                    progress.advance(mine.nbytes)
                    if dtype in FLOATS:
                        a, b = (
                            floats.widen(chunk.view(STORAGE[dtype]), dtype).astype(np.float64)
                            for chunk in (mine, theirs)
                        )
                        with np.errstate(invalid="ignore", over="ignore"):
                            error, size = error + float(np.sum((a - b) ** 2)), size + float(np.sum(a**2))
                    same &= np.array_equal(mine, theirs)
                differing += not same
            relative = float(f"{(error / size) ** 0.5:.3e}") if size and math.isfinite(error) else None
            found.append(
                {
                    "donor": str(donor.folder),
                    "tensors": differing,
                    "of": len(names),
                    "relative": relative,
                }
            )
    return found
