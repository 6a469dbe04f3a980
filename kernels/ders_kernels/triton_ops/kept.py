"""Kept entries whose positions are a bitmap (N:M, top) or are drawn again (drop): y = x @ D.T.

A program has whole rows of D. It goes through them from left to right with a count of the entries kept so far, so the
n-th kept entry finds its value, the n-th of the row's, and no position is ever read: 1 bit a weight for a bitmap, none
for drop, whose mask is the counter generator's. An entry is kept if its draw is above the row's threshold, the k-th
largest draw; thresholds are worked out once (`drop_threshold`), 8 bytes a row.
"""

import triton
import triton.language as tl

from .config import BLOCK_POINTERS, Case, Config
from .settings import INTERPRETED
from .tiles import block_of, code_at, draw_tile, is_empty, level, narrow, operand, store_sums

CONFIGS = (Config(16, 16, 64, 4, 1), Config(64, 16, 32, 4, 1))
COLUMNS_CONFIG = Config(0, 8, 128, 4, 1)
LARGEST_TILE = 1 << 18  # elements; the interpreter takes a program at a time, and time for each
MOST_ROWS = 65_535  # a grid's second axis
LONGEST = 1 << 15  # columns whose draws one program of `drop_threshold` holds


@triton.jit
def kept_mask(
    source, key, threshold, matrix_row, row, first, out, width, row_bytes,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Which of the columns first ... are kept, [rows, COLUMNS]."""
    column = first + tl.arange(0, COLUMNS)
    inside = (row[:, None] < out) & (column[None, :] < width)
    if DRAWN:
        drawn = draw_tile(key, row.to(tl.int64), width, first, COLUMNS, ALIGNED)
        least = tl.load(threshold + matrix_row * 2, mask=row < out, other=0).to(tl.uint32, bitcast=True)[:, None]
        last_tie = tl.load(threshold + matrix_row * 2 + 1, mask=row < out, other=0)[:, None]
        return inside & ((drawn > least) | ((drawn == least) & (column[None, :] <= last_tie)))
    else:
        byte = tl.load(source + matrix_row[:, None] * row_bytes + column[None, :] // 8, mask=inside, other=0)
        return inside & (((byte.to(tl.int32) >> (column[None, :] % 8)) & 1) != 0)


@triton.jit
def kept_tile(
    source, key, threshold, values, scale, expert, row, first, before, out, width, kept, row_bytes, value_bytes, groups,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Columns first ... of D, fp32 [rows, COLUMNS], and `before` [rows], entries kept so far, counted on."""
    matrix_row = expert * out + row
    mask = kept_mask(source, key, threshold, matrix_row, row, first, out, width, row_bytes, DRAWN, ALIGNED, COLUMNS)
    count = mask.to(tl.int32)
    place = before[:, None] + tl.cumsum(count, axis=1) - count
    value = kept_value(values, scale, matrix_row, place, mask, kept, value_bytes, groups, BITS, GROUP)
    return value, before + tl.sum(count, axis=1)


@triton.jit
def kept_columns(
    source, keys, threshold, columns, out, width, kept, row_bytes,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """-> columns int16 or int32 [E, out, kept]: where the kept entries of every expert stand (listed.py)."""
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix_row = expert * out + row
    key = tl.load(keys + expert) if DRAWN else 0
    before = tl.zeros((ROWS,), tl.int32)
    for first in range(0, width, COLUMNS):
        mask = kept_mask(source, key, threshold, matrix_row, row, first, out, width, row_bytes, DRAWN, ALIGNED, COLUMNS)
        count = mask.to(tl.int32)
        place = before[:, None] + tl.cumsum(count, axis=1) - count
        column = first + tl.arange(0, COLUMNS)[None, :] + tl.zeros_like(place)
        mask &= place < kept  # a bitmap that contradicts itself writes nowhere else
        tl.store(columns + matrix_row[:, None] * kept + place, column.to(columns.dtype.element_ty), mask=mask)
        before += tl.sum(count, axis=1)


@triton.jit
def kept_value(
    values, scale, matrix_row, place, mask, kept, value_bytes, groups, BITS: tl.constexpr, GROUP: tl.constexpr
):
    """Value number `place` of the rows [rows, n], fp32, 0 outside the mask; BITS 0: stored as bf16, else as integers."""
    mask = mask & (place < kept)
    if BITS == 0:
        return tl.load(values + matrix_row[:, None] * kept + place, mask=mask, other=0).to(tl.float32)
    else:
        code = code_at(values + matrix_row[:, None] * value_bytes, place, mask, BITS)
        factor = tl.load(scale + matrix_row[:, None] * groups + place // GROUP, mask=mask, other=0).to(tl.float32)
        return tl.where(mask, level(code, BITS) * factor, 0)


@triton.jit
def kept_product(
    x, source, keys, threshold, values, scale, y, pairs, block_expert, block_first, block_end, divisor,
    split_stride, out, width, kept, row_bytes, value_bytes, groups,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [*, width] -> y fp32 [1, pairs, out].

    source: bitmap uint8 [E, out, row_bytes]; or, DRAWN, keys int64 [E] and threshold int32 [E, out, 2]. values bf16
    [E, out, kept], or codes uint8 [E, out, value_bytes] with scale bf16 [E, out, groups].
    """
    if is_empty(block_first, block_end):
        return
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    key = tl.load(keys + expert) if DRAWN else 0
    before = tl.zeros((ROWS,), tl.int32)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, width, COLUMNS):
        change, before = kept_tile(
            source, key, threshold, values, scale, expert, row, first, before, out, width, kept, row_bytes, value_bytes,
            groups, DRAWN, ALIGNED, BITS, GROUP, COLUMNS,
        )  # fmt: skip
        column = first + tl.arange(0, COLUMNS)
        inputs = tl.load(
            x + x_row[None, :] * width + column[:, None], mask=there[None, :] & (column[:, None] < width), other=0
        )
        acc = tl.dot(
            operand(change, x.dtype.element_ty, WIDE),
            operand(inputs, x.dtype.element_ty, WIDE),
            acc,
            input_precision="ieee",
        )
    store_sums(y, acc, pair, there, row, out, split_stride)


@triton.jit
def kept_weight(
    base, weight, source, keys, threshold, values, scale, expert, out, width, kept, row_bytes, value_bytes, groups,
    DRAWN: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """base [out, width] and one expert's entries -> weight = round(base + D) of the base's dtype."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.zeros((), tl.int64) + expert
    key = tl.load(keys + expert) if DRAWN else 0
    before = tl.zeros((ROWS,), tl.int32)
    for first in range(0, width, COLUMNS):
        change, before = kept_tile(
            source, key, threshold, values, scale, expert, row, first, before, out, width, kept, row_bytes, value_bytes,
            groups, DRAWN, ALIGNED, BITS, GROUP, COLUMNS,
        )  # fmt: skip
        column = first + tl.arange(0, COLUMNS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        inside = (row[:, None] < out) & (column[None, :] < width)
        stored = tl.load(base + at, mask=inside, other=0).to(tl.float32)
        tl.store(weight + at, narrow(stored + change, weight.dtype.element_ty), mask=inside)


@triton.jit
def drop_threshold(keys, threshold, out, width, kept, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """keys int64 [E] -> threshold int32 [E, out, 2]: the kept-th largest draw of each row (its bits), and the last column
    that is kept of those with just this draw. A program has whole rows; both by bisection, from the highest bit down."""
    expert = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    drawn = draw_tile(tl.load(keys + expert), row, width, 0, COLUMNS, ALIGNED)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    least = tl.zeros((ROWS,), tl.uint32)
    bit = tl.full((ROWS,), 1 << 31, tl.uint32)
    for _ in range(32):
        tried = least | bit
        enough = tl.sum((inside & (drawn >= tried[:, None])).to(tl.int32), axis=1) >= kept
        least = tl.where(enough, tried, least)
        bit = bit >> 1
    tie = inside & (drawn == least[:, None])
    wanted = kept - tl.sum((inside & (drawn > least[:, None])).to(tl.int32), axis=1)
    last = tl.zeros((ROWS,), tl.int32) - 1
    step = COLUMNS
    while step > 0:  # the largest `last` up to which there are fewer ties than wanted
        fewer = tl.sum((tie & (column <= (last + step)[:, None])).to(tl.int32), axis=1) < wanted
        last = tl.where(fewer, last + step, last)
        step = step // 2
    at = threshold + (expert * out + row) * 2
    tl.store(at, least.to(tl.int32, bitcast=True), mask=row < out)
    tl.store(at + 1, last + 1, mask=row < out)


def threshold_config(width: int) -> Config:
    """A row, whose draws stay in registers, 16 to 64 of them in a thread; in the interpreter as many as it allows."""
    columns = max(16, triton.next_power_of_2(width))
    return Config(0, LARGEST_TILE // columns if INTERPRETED else 1, columns, min(16, max(1, columns // 1024)), 1)


_DRAWN = {"source": "i64", "keys": "i64", "threshold": "i32"}
_BITMAP = {"source": "u8", "keys": "u8", "threshold": "u8"}
_FORMS = (  # name, pointers, constants
    ("drop", _DRAWN | {"values": "bf16"}, {"DRAWN": True, "ALIGNED": True, "BITS": 0, "GROUP": 1}),
    ("drop+int4", _DRAWN | {"values": "u8"}, {"DRAWN": True, "ALIGNED": True, "BITS": 4, "GROUP": 128}),
    ("bitmap", _BITMAP | {"values": "bf16"}, {"DRAWN": False, "ALIGNED": False, "BITS": 0, "GROUP": 1}),
)
CASES = (
    *(
        Case(
            name,
            kept_product,
            config,
            BLOCK_POINTERS | pointers | {"x": "bf16", "scale": "bf16", "y": "fp32"},
            constants | {"TOKENS": config.tokens, "ROWS": config.rows, "COLUMNS": config.columns, "WIDE": False},
        )
        for name, pointers, constants in _FORMS
        for config in CONFIGS
    ),
    *(
        Case(
            f"{name}, W",
            kept_weight,
            CONFIGS[0],
            pointers | {"scale": "bf16", "base": "bf16", "weight": "bf16"},
            constants | {"ROWS": CONFIGS[0].rows, "COLUMNS": CONFIGS[0].columns},
            dots=False,
        )
        for name, pointers, constants in _FORMS
    ),
    *(
        Case(
            f"{name}, columns",
            kept_columns,
            COLUMNS_CONFIG,
            pointers | {"columns": "i16"},
            {"DRAWN": drawn, "ALIGNED": drawn, "ROWS": COLUMNS_CONFIG.rows, "COLUMNS": COLUMNS_CONFIG.columns},
            dots=False,
        )
        for name, pointers, drawn in (("drop", _DRAWN, True), ("bitmap", _BITMAP, False))
    ),
    *(
        Case(
            f"drop, thresholds of {width}",
            drop_threshold,
            config := threshold_config(width),
            {"keys": "i64", "threshold": "i32"},
            {"ROWS": config.rows, "COLUMNS": config.columns, "ALIGNED": True},
            dots=False,
        )
        for width in (4096, 14336, LONGEST)
    ),
)
