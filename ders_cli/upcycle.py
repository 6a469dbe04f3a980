"""Dense -> MoE: as base and deltas to be trained, as base and coded deltas of fine-tunes, or as a stock MoE in full."""

from pathlib import Path
from typing import Any

import numpy as np

from . import convert
from .checkpoint.tensor import FLOATS, STORAGE
from .codecs import DeltaCodec
from .codecs.none import NoneCodec
from .codecs.rank import RankCodec
from .codecs.sparse import SparseCodec
from .donors import FineTune
from .output import Options, refuse_occupied
from .plain import write_plain
from .recipe import Recipe
from .report import shown
from .upcycled import AncestorBase, UpcycledSource


def prepare_deltas(
    source: UpcycledSource, delta: str, group_size: int, out: Path, options: Options
) -> convert.Conversion:
    """The conversion that writes base and deltas."""
    recipe = Recipe(delta=delta, group_size=group_size, seed=source.seed)
    recipe.check()
    return convert.prepare(source, recipe, out, options, AncestorBase(source))


def write_full(source: UpcycledSource, out: Path, options: Options) -> dict[str, Any]:
    """Write N copies of everything: a stock MoE. Returns the bytes."""
    refuse_occupied(out, options, *source.folders)
    return write_plain(
        source, out, options, convert.fingerprint(source, Recipe(delta="none"), options), f"writing {out.name}"
    )


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

    Per donor: `tensors` that differ, out of `of`, and `relative`, the Frobenius norm of the difference by that of the weights.
    """
    names = [name for name in source.copied if name in source.reader.tensors]
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
                        a, b = (_values(chunk, dtype) for chunk in (mine, theirs))
                        error, size = error + float(np.sum((a - b) ** 2)), size + float(np.sum(a**2))
                    same &= np.array_equal(mine, theirs)
                differing += not same
            relative = (error / size) ** 0.5 if size else 0.0
            found.append(
                {
                    "donor": str(donor.folder),
                    "tensors": differing,
                    "of": len(names),
                    "relative": float(f"{relative:.3e}"),
                }
            )
    return found


def _values(chunk: np.ndarray, dtype: str) -> np.ndarray:
    from ders_kernels.cpu_ops import floats

    return floats.widen(chunk.view(STORAGE[dtype]), dtype).astype(np.float64)
