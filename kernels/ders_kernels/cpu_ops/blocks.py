"""Where there is no short way: W or D made in blocks of rows that caches hold, each used before the next is made."""

import torch
from torch import Tensor

from ..deltas import Delta, Projection
from . import decode
from .threads import share

WEIGHTS = 1 << 20  # of a block: 2 MB of bf16
TASK = 1 << 15  # weights that are worth waking a thread (10 us)


def synthesize(base: Tensor, delta: Delta, expert: int) -> Tensor:
    """base [out, in] -> W = round(B + D) of its dtype"""
    weight = torch.empty(base.shape, dtype=base.dtype)
    _fill(base, delta, expert, 0, weight)
    return weight


def whole_product(x: Tensor, projection: Projection, expert: int) -> Tensor:
    """x [T, in] -> x @ W.T [T, out] in x's dtype"""
    base, delta = projection.base, projection.delta
    if delta is None:
        return x @ base.T.to(x.dtype)
    out, step = x.new_empty(x.shape[0], base.shape[0]), _rows(base.shape)
    weight = torch.empty(min(step, base.shape[0]), base.shape[1], dtype=base.dtype)
    for first in range(0, base.shape[0], step):
        block = weight[: base.shape[0] - first]
        _fill(base, delta, expert, first, block)
        out[:, first : first + step] = x @ block.T.to(x.dtype)
    return out


def delta_product(x: Tensor, delta: Delta, expert: int) -> Tensor:
    """x [T, in] -> x @ D.T [T, out] in x's dtype; D and the sums are fp32."""
    _, rows, width = delta.shape
    out, wide, step = x.new_empty(x.shape[0], rows), x.float(), _rows((rows, width))
    for first in range(0, rows, step):
        block = torch.empty(min(step, rows - first), width)

        def some(a: int, b: int, first: int = first, block: Tensor = block) -> None:
            block[a:b] = torch.from_numpy(decode.rows(delta, expert, first + a, first + b))

        share(some, block.shape[0], block.numel() // TASK)
        out[:, first : first + step] = wide @ block.T
    return out


def _fill(base: Tensor, delta: Delta, expert: int, first: int, weight: Tensor) -> None:
    """W's rows from `first` on, into weight [rows, in], on all threads, in steps that a core's cache holds."""
    step = max(1, TASK * 4 // max(1, base.shape[1]))

    def some(a: int, b: int) -> None:
        for row in range(a, b, step):
            decode.synthesize(base, delta, expert, first + row, weight[row : min(row + step, b)])

    share(some, weight.shape[0], weight.numel() // TASK)


def _rows(shape: tuple[int, ...]) -> int:
    return max(1, WEIGHTS // max(1, shape[1]))
