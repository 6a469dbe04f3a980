"""Pairs of token and expert, sorted by expert and cut into blocks that one program's tile holds.

Nothing here waits for the device: the number of blocks is a bound, and blocks past the last one have first = end.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import Case, Config

CONFIG = Config(0, 0, 0, 16, 1)
FEW = 128  # pairs that one small program sorts; more take a dozen torch operations


class Blocks(NamedTuple):
    """Pair p = token * k + place. A block is pairs[first : end] cut off after a tile's tokens; all int32."""

    pairs: Tensor  # [P] by expert, then in order
    expert: Tensor  # [blocks]
    first: Tensor  # [blocks]
    end: Tensor  # [blocks]: of the expert's pairs


class OneExpert:
    """Every row of x [T, in] is a token of one expert."""

    def __init__(self, expert: int, x: Tensor):
        self._expert, self._device = expert, x.device
        self.pairs = self.mean = x.shape[0]

    def blocks(self, size: int) -> Blocks:
        first = torch.arange(0, self.pairs, size, dtype=torch.int32, device=self._device)
        every = torch.arange(self.pairs, dtype=torch.int32, device=self._device)
        return Blocks(every, torch.full_like(first, self._expert), first, torch.full_like(first, self.pairs))


def by_expert(index: Tensor, experts: int, size: int) -> Blocks:
    """int64 [T, k] -> blocks of at most `size` pairs of one expert; numbers outside 0..experts-1 are in none."""
    flat = index.reshape(-1)
    count = flat.numel()
    if count <= FEW:
        made = torch.empty((4, max(count, 1)), dtype=torch.int32, device=index.device)
        room = max(16, triton.next_power_of_2(count))
        sort_few[(1,)](flat, *made, count, experts, size, PAIRS=room, **CONFIG.launch())
        return Blocks(*made)
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    ordered, order = flat.sort(stable=True)
    each = torch.arange(experts, device=index.device)
    begin, end = torch.searchsorted(ordered, each), torch.searchsorted(ordered, each, right=True)
    ends = ((end - begin + size - 1) // size).cumsum(0)
    block = torch.arange(min(count, count // size + experts), device=index.device)
    expert = torch.searchsorted(ends, block, right=True).clamp(max=experts - 1)
    own = block - torch.where(expert > 0, ends[expert - 1], 0)
    first = torch.where(block < ends[-1], begin[expert] + own * size, count)
    return Blocks(order.int(), expert.int(), first.int(), torch.minimum(end[expert], end[-1]).int())


@triton.jit
def sort_few(index, pairs, block_expert, block_first, block_end, count, experts, size, PAIRS: tl.constexpr):
    """One program: every pair counts those that come before it, and the blocks that start before it."""
    p, q = tl.arange(0, PAIRS)[:, None], tl.arange(0, PAIRS)[None, :]
    mine = tl.load(index + p, mask=p < count, other=-1).to(tl.int32)
    other = tl.load(index + q, mask=q < count, other=-1).to(tl.int32)
    mine_there, other_there = (mine >= 0) & (mine < experts), (other >= 0) & (other < experts)
    mine, other = tl.where(mine_there, mine, experts), tl.where(other_there, other, experts)
    before = ((other < mine) | ((other == mine) & (q < p))) & (q < count)
    rank = tl.sum(before.to(tl.int32), axis=1)
    smaller = tl.sum(((other < mine) & (q < count)).to(tl.int32), axis=1)
    upto = tl.sum(((other <= mine) & (q < count)).to(tl.int32), axis=1)
    # blocks of smaller experts: a pair of theirs starts one if its place among its expert's pairs is a multiple of size
    expert = tl.sum(tl.where(q == 0, mine, 0), axis=1)
    there = expert < experts
    place = rank - smaller
    starts = there & (place % size == 0)
    lanes = tl.arange(0, PAIRS)
    real = lanes < count
    tl.store(pairs + rank, lanes, mask=real)
    starts_row = tl.reshape(starts.to(tl.int32), [1, PAIRS])
    number = tl.sum(tl.where(before, starts_row, 0), axis=1)
    total = tl.sum(starts.to(tl.int32), axis=0)
    tl.store(block_expert + number, expert.to(tl.int32), mask=starts)
    tl.store(block_first + number, rank, mask=starts)
    tl.store(block_end + number, upto, mask=starts)
    unused = real & (lanes >= total)
    tl.store(block_expert + lanes, 0, mask=unused)
    tl.store(block_first + lanes, 0, mask=unused)
    tl.store(block_end + lanes, 0, mask=unused)


CASES = (
    Case(
        "sorting pairs",
        sort_few,
        CONFIG,
        {"index": "i64", "pairs": "i32", "block_expert": "i32", "block_first": "i32", "block_end": "i32"},
        {"PAIRS": FEW},
        dots=False,
    ),
)
