"""Launches of the products: which kernel a delta takes, with which tiles and arguments. Parts lie on x's device, contiguous."""

from typing import Protocol

import torch
import triton
from torch import Tensor

from ..deltas import Bitmap, Delta, Drawn, EliasFano, Ints, Kept, LowRank, Sum
from ..packing import low_bits
from . import elias_fano, ints, kept, listed, low_rank
from .config import Config, fitting
from .pairs import Blocks
from .settings import wide


class Inputs:
    """x [*, in]: pair p has row p // divisor. Copies in planes are made once for each number of planes."""

    def __init__(self, x: Tensor, divisor: int):
        self.x, self.divisor = x.contiguous(), divisor
        self._planes: dict[int, Tensor] = {}

    def planes(self, count: int) -> Tensor:
        if count not in self._planes:
            self._planes[count] = ints.planes(self.x, count)
        return self._planes[count]


class Routing(Protocol):
    """Which pairs go to which expert."""

    pairs: int
    mean: float  # tokens of an expert

    def blocks(self, size: int) -> Blocks:
        """The pairs, in blocks of at most `size`."""


def product(inputs: Inputs, delta: Delta, routing: Routing) -> Tensor:
    """fp32 [parts, pairs, out], which summed over the parts are x[pair // divisor] @ D_e.T, e the pair's expert.

    Rows whose pair is in no block hold anything.
    """
    if isinstance(delta, Ints):
        return _ints(inputs, delta, routing)
    if isinstance(delta, Kept):
        return _listed(inputs, delta, routing) if _by_list(delta, routing) else _kept(inputs, delta, routing)
    if isinstance(delta, LowRank):
        return _low_rank(inputs, delta, routing)
    if isinstance(delta, Sum):
        return torch.cat([product(inputs, delta.first, routing), product(inputs, delta.then, routing)])
    raise TypeError(f"no kernel for {type(delta).__name__}")


def _grid(blocks: Blocks, out: int, config: Config) -> tuple[int, int, int]:
    """Blocks of one expert beside each other, so that they share its weights in the cache."""
    return blocks.expert.numel(), triton.cdiv(out, config.rows), config.splits


def _sums(inputs: Inputs, routing: Routing, out: int, config: Config) -> Tensor:
    return torch.empty((config.splits, routing.pairs, out), dtype=torch.float32, device=inputs.x.device)


def _ints(inputs: Inputs, delta: Ints, routing: Routing) -> Tensor:
    (_, out, width), row_bytes, groups = delta.shape, delta.codes.shape[2], delta.scale.shape[2]
    unit = ints.codes_in_unit(delta.bits)
    step = delta.group // unit
    by_words = width % delta.group == 0 and delta.group % unit == 0 and step & (step - 1) == 0
    if routing.mean == 1 and by_words and delta.codes.data_ptr() % 4 == 0:
        config = ints.token_config(delta.bits)
        blocks, y = routing.blocks(1), _sums(inputs, routing, out, config)
        ints.int_token_product[_grid(blocks, out, config)](
            inputs.planes(unit), delta.codes.view(torch.int32), delta.scale, y, *blocks, inputs.divisor, y.stride(0),
            out, width // unit, row_bytes // 4, groups, BITS=delta.bits, PLANES=unit, STEP=step, ROWS=config.rows,
            SPLITS=config.splits, STAGES=config.launch()["num_stages"], **config.launch(),
        )  # fmt: skip
        return y
    config = fitting(ints.CONFIGS, routing.mean)
    blocks, y = routing.blocks(config.tokens), _sums(inputs, routing, out, config)
    ints.int_product[_grid(blocks, out, config)](
        inputs.x, delta.codes, delta.scale, y, *blocks, inputs.divisor, y.stride(0), out, width, row_bytes, groups,
        BITS=delta.bits, GROUP=delta.group, TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns,
        SPLITS=config.splits, WIDE=wide(inputs.x), **config.launch(),
    )  # fmt: skip
    return y


def _by_list(delta: Kept, routing: Routing) -> bool:
    """Elias-Fano positions always: a tile of columns has no simple place in them."""
    return routing.mean <= listed.CONFIGS[-1].tokens or isinstance(delta.positions, EliasFano)


def _listed(inputs: Inputs, delta: Kept, routing: Routing) -> Tensor:
    config, (_, out, width) = fitting(listed.CONFIGS, routing.mean), delta.shape
    blocks, y = routing.blocks(config.tokens), _sums(inputs, routing, out, config)
    columns = delta.once("columns", lambda: listed_columns(delta))
    values, scale, value_bytes, groups, valued = value_arguments(delta)
    listed.listed_product[_grid(blocks, out, config)](
        inputs.x, columns, values, scale, y, *blocks, inputs.divisor, y.stride(0), out, width, delta.kept, value_bytes, groups,
        TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns, **valued, **config.launch(),
    )  # fmt: skip
    return y


def _kept(inputs: Inputs, delta: Kept, routing: Routing) -> Tensor:
    config, (_, out, width) = fitting(kept.CONFIGS, routing.mean), delta.shape
    blocks, y = routing.blocks(config.tokens), _sums(inputs, routing, out, config)
    positions, constants = kept_arguments(delta, config)
    kept.kept_product[_grid(blocks, out, config)](
        inputs.x, *positions[:5], y, *blocks, inputs.divisor, y.stride(0), out, width, delta.kept, *positions[5:],
        TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns, WIDE=wide(inputs.x), **constants,
        **config.launch(),
    )  # fmt: skip
    return y


def _low_rank(inputs: Inputs, delta: LowRank, routing: Routing) -> Tensor:
    x, (_, out, width), rank = inputs.x, delta.shape, delta.right.shape[1]
    right = delta.once(("right", x.dtype), lambda: delta.right.to(x.dtype))
    left = delta.once(("left", x.dtype), lambda: delta.left.to(x.dtype))
    config = fitting(low_rank.RIGHT, routing.mean)
    blocks, inner = routing.blocks(config.tokens), _sums(inputs, routing, rank, config)
    low_rank.right_product[_grid(blocks, rank, config)](
        x, right, inner, *blocks, inputs.divisor, inner.stride(0), rank, width,
        TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns, SPLITS=config.splits, WIDE=wide(x),
        **config.launch(),
    )  # fmt: skip
    config = fitting(low_rank.LEFT, routing.mean)
    blocks, y = routing.blocks(config.tokens), _sums(inputs, routing, out, config)
    low_rank.left_product[_grid(blocks, out, config)](
        inner, left, y, *blocks, inner.stride(0), out, rank, inner.shape[0],
        TOKENS=config.tokens, ROWS=config.rows, COLUMNS=config.columns, WIDE=wide(x), **config.launch(),
    )  # fmt: skip
    return y


def kept_arguments(delta: Kept, config: Config) -> tuple[tuple, dict]:
    """source, keys, threshold, values, scale, row_bytes, value_bytes, groups; and the constants."""
    values, scale, value_bytes, groups, constants = value_arguments(delta)
    if isinstance(delta.positions, Bitmap):
        bits = delta.positions.bits
        arguments = bits, bits, bits, values, scale, bits.shape[2], value_bytes, groups
        return arguments, constants | {"DRAWN": False, "ALIGNED": False}
    keys, threshold = delta.once("threshold", lambda: thresholds(delta))
    aligned = delta.width % 4 == 0
    return (keys, keys, threshold, values, scale, 0, value_bytes, groups), constants | {
        "DRAWN": True,
        "ALIGNED": aligned,
    }


def value_arguments(delta: Kept) -> tuple:
    """values, scale, value_bytes, groups, {BITS, GROUP}"""
    if isinstance(delta.values, Ints):
        coded = delta.values
        return (
            coded.codes,
            coded.scale,
            coded.codes.shape[2],
            coded.scale.shape[2],
            {"BITS": coded.bits, "GROUP": coded.group},
        )
    return delta.values, delta.values, 0, 0, {"BITS": 0, "GROUP": 1}


def thresholds(delta: Kept) -> tuple[Tensor, Tensor]:
    """Drawn positions: keys int64 [E] and threshold int32 [E, out, 2]."""
    assert isinstance(delta.positions, Drawn)
    experts, out, width = delta.shape
    device = value_arguments(delta)[0].device
    signed = [key - (key >> 63 << 64) for key in delta.positions.keys]
    keys = torch.tensor(signed, dtype=torch.int64, device=device)
    threshold = torch.empty((experts, out, 2), dtype=torch.int32, device=device)
    config = kept.threshold_config(width)
    kept.drop_threshold[(experts, triton.cdiv(out, config.rows))](
        keys, threshold, out, width, delta.kept,
        ROWS=config.rows, COLUMNS=config.columns, ALIGNED=width % 4 == 0, **config.launch(),
    )  # fmt: skip
    return keys, threshold


def listed_columns(delta: Kept) -> Tensor:
    """int16 [E, out, kept], int32 from 2^15 columns on: the column of every kept entry; `in` for unused slots."""
    experts, out, width = delta.shape
    kind = torch.int16 if width < 1 << 15 else torch.int32
    columns = torch.full((experts, out, delta.kept), width, dtype=kind, device=value_arguments(delta)[0].device)
    if isinstance(delta.positions, EliasFano):
        config = elias_fano.CONFIG
        low, high, low_bytes, high_bytes, constants = elias_fano_arguments(delta)
        elias_fano.elias_fano_columns[(experts, triton.cdiv(out, config.rows))](
            low, high, columns, out, delta.kept, low_bytes, high_bytes,
            ROWS=config.rows, COLUMNS=config.columns, **constants, **config.launch(),
        )  # fmt: skip
        return columns
    config = kept.COLUMNS_CONFIG
    positions, constants = kept_arguments(delta, config)
    kept.kept_columns[(experts, triton.cdiv(out, config.rows))](
        *positions[:3], columns, out, width, delta.kept, positions[5], ROWS=config.rows, COLUMNS=config.columns,
        DRAWN=constants["DRAWN"], ALIGNED=constants["ALIGNED"], **config.launch(),
    )  # fmt: skip
    return columns


def elias_fano_arguments(delta: Kept) -> tuple[Tensor, Tensor, int, int, dict]:
    """low, high, low_bytes, high_bytes, {LOW}"""
    assert isinstance(delta.positions, EliasFano)
    low, high = delta.positions.low, delta.positions.high
    if low is None:
        return high, high, 0, high.shape[2], {"LOW": 0}
    return low, high, low.shape[2], high.shape[2], {"LOW": low_bits(delta.kept, delta.width)}
