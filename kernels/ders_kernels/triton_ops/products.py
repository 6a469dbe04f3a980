"""Launches of the products: which kernel a delta takes, with which tiles and arguments.

Parts must lie on x's device, contiguous. y is fp32 [pairs, out]; rows of y whose pair is in no block are left as they are.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ..deltas import Bitmap, Delta, Drawn, EliasFano, Ints, Kept, LowRank, Sum
from ..packing import low_bits
from . import dense, elias_fano, ints, kept
from .config import Config, fitting
from .pairs import Blocks
from .settings import INTERPRETED, wide

Blocked = Callable[[int], Blocks]  # tokens of a tile -> the pairs, cut so


def product(x: Tensor, delta: Delta, blocked: Blocked, divisor: int, tokens: float, y: Tensor, add: bool) -> None:
    """y[pair] (+)= x[pair // divisor] @ D_e.T, e the pair's expert; tokens: the mean number of an expert."""
    if isinstance(delta, Ints):
        _ints(x, delta, blocked, divisor, tokens, y, add)
    elif isinstance(delta, Kept) and isinstance(delta.positions, EliasFano):
        _elias_fano(x, delta, blocked, divisor, tokens, y, add)
    elif isinstance(delta, Kept):
        _kept(x, delta, blocked, divisor, tokens, y, add)
    elif isinstance(delta, LowRank):
        _low_rank(x, delta, blocked, divisor, tokens, y, add)
    elif isinstance(delta, Sum):
        product(x, delta.first, blocked, divisor, tokens, y, add)
        product(x, delta.then, blocked, divisor, tokens, y, True)
    else:
        raise TypeError(f"no kernel for {type(delta).__name__}")


def dense_product(x: Tensor, weight: Tensor, blocked: Blocked, divisor: int, tokens: float, y: Tensor, add: bool) -> None:
    """The same with stored matrices, [E, out, in] or [out, in]."""
    config = fitting(dense.CONFIGS, tokens)
    blocks, (out, width) = blocked(config.tokens), weight.shape[-2:]
    dense.dense_product[_grid(blocks, out, config)](
        x, weight, y, *blocks, divisor, out, width, out * width if weight.ndim == 3 else 0,
        TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns, ADD=add, WIDE=wide(x), **config.launch(),
    )  # fmt: skip


def int_whole_product(x: Tensor, base: Tensor, delta: Ints, blocked: Blocked, divisor: int, tokens: float, y: Tensor) -> None:
    """y[pair] = x[pair // divisor] @ round(B + D_e).T"""
    config = fitting(ints.WHOLE, tokens)
    blocks, (_, out, width) = blocked(config.tokens), delta.shape
    ints.int_whole_product[_grid(blocks, out, config)](
        x, base, delta.codes, delta.scale, y, *blocks, divisor, out, width, delta.codes.shape[2], delta.scale.shape[2],
        BITS=delta.bits, GROUP=delta.group, TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns,
        WIDE=wide(x), **config.launch(),
    )  # fmt: skip


def _grid(blocks: Blocks, out: int, config: Config) -> tuple[int, int]:
    """Blocks of one expert beside each other, so that they share its weights in the cache."""
    return blocks.expert.numel(), triton.cdiv(out, config.rows)


def _ints(x: Tensor, delta: Ints, blocked: Blocked, divisor: int, tokens: float, y: Tensor, add: bool) -> None:
    config = fitting(ints.APART, tokens)
    blocks, (_, out, width) = blocked(config.tokens), delta.shape
    ints.int_product[_grid(blocks, out, config)](
        x, delta.codes, delta.scale, y, *blocks, divisor, out, width, delta.codes.shape[2], delta.scale.shape[2],
        BITS=delta.bits, GROUP=delta.group, TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns,
        ADD=add, WIDE=wide(x), **config.launch(),
    )  # fmt: skip


def _kept(x: Tensor, delta: Kept, blocked: Blocked, divisor: int, tokens: float, y: Tensor, add: bool) -> None:
    config = fitting(kept.CONFIGS, tokens)
    blocks, (_, out, width) = blocked(config.tokens), delta.shape
    positions, constants = kept_arguments(delta, config)
    kept.kept_product[_grid(blocks, out, config)](
        x, *positions[:3], *positions[3:5], y, *blocks, divisor, out, width, delta.kept, *positions[5:],
        TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns, ADD=add, WIDE=wide(x), **constants,
        **config.launch(),
    )  # fmt: skip


def kept_arguments(delta: Kept, config: Config) -> tuple[tuple, dict]:
    """source, keys, threshold, values, scale, row_bytes, value_bytes, groups; and the constants."""
    values, scale, value_bytes, groups, constants = value_arguments(delta)
    if isinstance(delta.positions, Bitmap):
        bits = delta.positions.bits
        arguments = bits, bits, bits, values, scale, bits.shape[2], value_bytes, groups
        return arguments, constants | {"DRAWN": False, "ALIGNED": False}
    keys, threshold = delta.once("threshold", lambda: thresholds(delta))
    aligned = delta.width % 4 == 0 and config.columns % 4 == 0
    return (keys, keys, threshold, values, scale, 0, value_bytes, groups), constants | {"DRAWN": True, "ALIGNED": aligned}


def value_arguments(delta: Kept) -> tuple:
    """values, scale, value_bytes, groups, {BITS, GROUP}"""
    if isinstance(delta.values, Ints):
        coded = delta.values
        return coded.codes, coded.scale, coded.codes.shape[2], coded.scale.shape[2], {"BITS": coded.bits, "GROUP": coded.group}
    return delta.values, delta.values, 0, 0, {"BITS": 0, "GROUP": 1}


def thresholds(delta: Kept) -> tuple[Tensor, Tensor]:
    """Drawn positions: keys int64 [E] and threshold int32 [E, out, 2]."""
    assert isinstance(delta.positions, Drawn)
    experts, out, width = delta.shape
    device = value_arguments(delta)[0].device
    signed = [key - (key >> 63 << 64) for key in delta.positions.keys]
    keys = torch.tensor(signed, dtype=torch.int64, device=device)
    threshold = torch.empty((experts, out, 2), dtype=torch.int32, device=device)
    config = threshold_config(width)
    kept.drop_threshold[(experts, triton.cdiv(out, config.rows))](
        keys, threshold, out, width, delta.kept,
        ROWS=config.rows, COLUMNS=config.columns, ALIGNED=width % 4 == 0, **config.launch(),
    )  # fmt: skip
    return keys, threshold


def threshold_config(width: int) -> Config:
    """Rows whose draws stay in registers: 16 to 64 of them in a thread."""
    columns = max(16, triton.next_power_of_2(width))
    return Config(0, 256 if INTERPRETED else 1, columns, min(16, max(1, columns // 1024)), 1)


def _elias_fano(x: Tensor, delta: Kept, blocked: Blocked, divisor: int, tokens: float, y: Tensor, add: bool) -> None:
    config = fitting(elias_fano.CONFIGS, tokens)
    blocks, (_, out, width) = blocked(config.tokens), delta.shape
    low, high, low_bytes, high_bytes, constants = elias_fano_arguments(delta)
    values, scale, value_bytes, groups, valued = value_arguments(delta)
    elias_fano.elias_fano_product[_grid(blocks, out, config)](
        x, low, high, values, scale, y, *blocks, divisor, out, width, delta.kept, low_bytes, high_bytes, value_bytes, groups,
        TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns, ADD=add, **constants, **valued, **config.launch(),
    )  # fmt: skip


def elias_fano_arguments(delta: Kept) -> tuple[Tensor, Tensor, int, int, dict]:
    """low, high, low_bytes, high_bytes, {LOW}"""
    assert isinstance(delta.positions, EliasFano)
    low, high = delta.positions.low, delta.positions.high
    if low is None:
        return high, high, 0, high.shape[2], {"LOW": 0}
    return low, high, low.shape[2], high.shape[2], {"LOW": low_bits(delta.kept, delta.width)}


def _low_rank(x: Tensor, delta: LowRank, blocked: Blocked, divisor: int, tokens: float, y: Tensor, add: bool) -> None:
    left, right = (delta.once((name, x.dtype), lambda part=part: part.to(x.dtype)) for name, part in (("left", delta.left), ("right", delta.right)))
    inner = torch.empty((y.shape[0], right.shape[1]), dtype=torch.float32, device=x.device)
    dense_product(x, right, blocked, divisor, tokens, inner, False)
    dense_product(inner.to(x.dtype), left, blocked, 1, tokens, y, add)
