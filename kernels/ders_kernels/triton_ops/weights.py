"""Launches of the synthesis: round(B + D) of one expert, the same bits as from the codec's own decoding."""

import torch
import triton
from torch import Tensor

from ..deltas import Delta, EliasFano, Ints, Kept, LowRank, Sum
from . import elias_fano, kept, synthesis
from .products import elias_fano_arguments, kept_arguments, value_arguments


def synthesize(base: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    base = base.contiguous()
    if isinstance(delta, Sum):
        # -0 + D = D for every D, also for -0
        change = synthesize(torch.full(base.shape, -0.0, device=base.device), delta.first, expert)
        change = synthesize(change, delta.then, expert)
        return (base.float() + change).to(base.dtype)
    if isinstance(delta, Kept) and isinstance(delta.positions, EliasFano):
        return _elias_fano(base, delta, expert)
    weight = torch.empty_like(base)
    out, width = base.shape
    config = synthesis.CONFIG
    grid = triton.cdiv(out, config.rows), triton.cdiv(width, config.columns)
    if isinstance(delta, Ints):
        synthesis.int_weight[grid](
            base, weight, delta.codes, delta.scale, expert, out, width, delta.codes.shape[2], delta.scale.shape[2],
            BITS=delta.bits, GROUP=delta.group, ROWS=config.rows, COLUMNS=config.columns, **config.launch(),
        )  # fmt: skip
    elif isinstance(delta, LowRank):
        synthesis.low_rank_weight[grid](
            base, weight, delta.left, delta.right, expert, out, width, delta.right.shape[1],
            ROWS=config.rows, COLUMNS=config.columns, **config.launch(),
        )  # fmt: skip
    elif isinstance(delta, Kept):
        config = kept.CONFIGS[0]
        positions, constants = kept_arguments(delta, config)
        kept.kept_weight[(triton.cdiv(out, config.rows),)](
            base, weight, *positions[:5], expert, out, width, delta.kept, *positions[5:],
            ROWS=config.rows, COLUMNS=config.columns, **constants, **config.launch(),
        )  # fmt: skip
    else:
        raise TypeError(f"no kernel for {type(delta).__name__}")
    return weight


def _elias_fano(base: Tensor, delta: Kept, expert: int) -> Tensor:
    # B + 0 where there are no entries: -0 becomes 0, as it does in the codec
    weight, (out, width), config = base + 0, base.shape, elias_fano.CONFIG
    low, high, low_bytes, high_bytes, constants = elias_fano_arguments(delta)
    values, scale, value_bytes, groups, valued = value_arguments(delta)
    elias_fano.elias_fano_weight[(triton.cdiv(out, config.rows),)](
        base, weight, low, high, values, scale, expert, out, width, delta.kept, low_bytes, high_bytes, value_bytes, groups,
        ROWS=config.rows, COLUMNS=config.columns, **constants, **valued, **config.launch(),
    )  # fmt: skip
    return weight
