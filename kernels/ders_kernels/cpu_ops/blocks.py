"""Where there is no short way: W or D made in blocks of rows that caches hold, each used before the next is made."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..deltas import Delta
from . import decode
from .threads import share

WEIGHTS = 1 << 21  # of a block: 4 MB of bf16
STEP = 1 << 18  # weights that are decoded in one call, some codecs' by way of fp32
TASK = 1 << 19  # weights that are worth waking a thread (60 us)


def synthesize(base: Tensor, delta: Delta, expert: int) -> Tensor:
    """base [out, in] -> W = round(B + D) of its dtype"""
    weight = torch.empty(base.shape, dtype=base.dtype)
    _fill(base, delta, expert, 0, weight)
    return weight


def whole_products(
    x: Tensor, base: Tensor | None, delta: Delta, experts: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """x [pairs, in], experts and counts as in pairs.py -> x_p @ W.T [pairs, out] in x's dtype, W rounded to the base's.

    A block of the base serves all experts while it is in a cache. Without a base: x_p @ D.T, D rounded to x's dtype.
    """
    (_, rows, width), kind = delta.shape, x.dtype if base is None else base.dtype
    each, out, step = x.split(list(counts)), x.new_empty(x.shape[0], rows), max(1, WEIGHTS // max(1, width))
    weight = torch.empty(min(step, rows), width, dtype=kind)
    nothing = torch.zeros_like(weight) if base is None else None
    for first in range(0, rows, step):
        block = weight[: rows - first]
        before = base[first : first + step] if nothing is None else nothing[: rows - first]
        for own, y, expert in zip(each, out[:, first : first + step].split(list(counts)), experts, strict=True):
            _fill(before, delta, expert, first, block)
            y.copy_(own @ block.T.to(x.dtype))
    return out


def _fill(base: Tensor, delta: Delta, expert: int, first: int, weight: Tensor) -> None:
    """W's rows from `first` on, of which base has these only, into weight [rows, in]; on all threads."""
    step = max(1, STEP // max(1, base.shape[1]))

    def some(begin: int, end: int) -> None:
        for row in range(begin, end, step):
            at = slice(row, min(row + step, end))
            decode.synthesize(base[at], delta, expert, first + row, weight[at])

    share(some, weight.shape[0], weight.numel() // TASK)
