"""Kept entries whose positions are Elias-Fano coded (ternary, top of few): y = x @ D.T, straight from the coded bits.

Bit b of a row's `high`, if set and the i-th that is, says column (b - i) << l | low_i (packing.py). A program goes
through the bits of its rows with a count of those set, and gathers its tokens' inputs at the columns: about two and a
half bits are looked at for each entry, and nothing is multiplied that is 0. For few tokens; many take the synthesised W.
"""

import triton
import triton.language as tl

from .config import Config
from .kept import kept_value
from .tiles import block_of, code_at, narrow, store_sums

CONFIGS = (Config(1, 16, 128, 4, 2), Config(4, 8, 128, 4, 2))


@triton.jit
def entries(
    low, high, values, scale, expert, row, first, before, out, width, kept, low_bytes, high_bytes, value_bytes, groups,
    LOW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bits first ... of `high`: columns int32, values fp32, which are entries, each [rows, COLUMNS]; and `before` counted on."""
    matrix_row = expert * out + row
    bit = first + tl.arange(0, COLUMNS)
    inside = (row[:, None] < out) & (bit[None, :] < high_bytes * 8)
    byte = tl.load(high + matrix_row[:, None] * high_bytes + bit[None, :] // 8, mask=inside, other=0).to(tl.int32)
    found = inside & (((byte >> (bit[None, :] % 8)) & 1) != 0)
    count = found.to(tl.int32)
    place = before[:, None] + tl.cumsum(count, axis=1) - count
    column = bit[None, :] - place
    if LOW > 0:
        column = column << LOW
        for one in tl.static_range(LOW):  # low bits one by one: up to 15 of them, in up to three bytes
            column |= code_at(low + matrix_row[:, None] * low_bytes, place * LOW + one, found, 1) << one
    real = found & (column < width)  # else an unused slot
    value = kept_value(values, scale, matrix_row, place, real, kept, value_bytes, groups, BITS, GROUP)
    return column, value, real, before + tl.sum(count, axis=1)


@triton.jit
def elias_fano_product(
    x, low, high, values, scale, y, pairs, block_expert, block_first, block_end, divisor,
    out, width, kept, low_bytes, high_bytes, value_bytes, groups,
    LOW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """x [*, width], low uint8 [E, out, low_bytes], high uint8 [E, out, high_bytes], values as in kept.py -> y fp32 [pairs, out]."""
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    before = tl.zeros((ROWS,), tl.int32)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, high_bytes * 8, COLUMNS):
        column, value, real, before = entries(
            low, high, values, scale, expert, row, first, before, out, width, kept, low_bytes, high_bytes, value_bytes,
            groups, LOW, BITS, GROUP, COLUMNS,
        )  # fmt: skip
        at = x + x_row[None, None, :] * width + column[:, :, None]
        inputs = tl.load(at, mask=real[:, :, None] & there[None, None, :], other=0).to(tl.float32)
        acc += tl.sum(value[:, :, None] * inputs, axis=1)
    store_sums(y, acc, pair, there, row, out, ADD)


@triton.jit
def elias_fano_weight(
    base, weight, low, high, values, scale, expert, out, width, kept, low_bytes, high_bytes, value_bytes, groups,
    LOW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """weight [out, width], which holds the base already: round(base + D) is put where there are entries."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.zeros((), tl.int64) + expert
    before = tl.zeros((ROWS,), tl.int32)
    for first in range(0, high_bytes * 8, COLUMNS):
        column, value, real, before = entries(
            low, high, values, scale, expert, row, first, before, out, width, kept, low_bytes, high_bytes, value_bytes,
            groups, LOW, BITS, GROUP, COLUMNS,
        )  # fmt: skip
        at = row[:, None].to(tl.int64) * width + column
        stored = tl.load(base + at, mask=real, other=0).to(tl.float32)
        tl.store(weight + at, narrow(stored + value, weight.dtype.element_ty), mask=real)
