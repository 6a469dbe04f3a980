"""Integers: y = x @ D.T with D = level(code) * scale, and y = x @ round(B + D).T.

Codes go into products as the unsigned numbers c that they are, put into a float's mantissa by one OR instead of being
converted, and what that adds is taken off the sums, group by group:

    sum level x = f (sum (o + c / u) x - (o + m / u) sum x) u        level = f (c - m), o and u the float's

    int_token_product   one token: multiply and add, lane by lane. Codes are taken in words of 32 bits (of 3, 5, 6, 7 bits:
                        in units of as many words), code j of every word with the inputs j, j + n, ... (`planes`): nothing is
                        shuffled, and a code costs a shift, an AND-OR and a multiply-add
    int_product         more: matrix instructions
"""

import triton
import triton.language as tl
from torch import Tensor

from .config import BLOCK_POINTERS, Case, Config
from .tiles import block_of, code_tile, is_empty, level, operand, share, store_sums

CONFIGS = (Config(16, 64, 128, 4, 3, splits=4), Config(32, 64, 128, 4, 3, splits=2), Config(64, 64, 128, 4, 3))


def token_config(bits: int) -> Config:
    """Many rows for a thread where codes are few bits, so that an input, once loaded, is used often."""
    if 32 % bits:
        return Config(1, 16, 128, 1, 1, splits=8)
    return {8: Config(1, 64, 128, 4, 3, splits=4), 4: Config(1, 128, 128, 4, 1, splits=16)}.get(
        bits, Config(1, 256, 128, 4, 1, splits=16)
    )


def codes_in_unit(bits: int) -> int:
    """Codes in a word of 32 bits, or in the `bits` words that 32 codes take."""
    return 32 // bits if 32 % bits == 0 else 32


def planes(x: Tensor, count: int) -> Tensor:
    """x [T, in], in a multiple of count -> [T, count, in / count]: inputs j, j + count, ... together."""
    return x.view(x.shape[0], -1, count).transpose(1, 2).contiguous()


@triton.jit
def mantissa(low, high, CODE: tl.constexpr, BITS: tl.constexpr):
    """1 + c / 2^BITS, fp32, c the bits CODE * BITS % 32 ... of `low`, going on in `high`."""
    SHIFT: tl.constexpr = CODE * BITS % 32 - (23 - BITS)
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    if SHIFT >= 0:
        bits = low >> SHIFT
    else:
        bits = low << -SHIFT
    if CODE * BITS % 32 + BITS > 32:
        bits |= high << (32 - SHIFT)
    return ((bits & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def int_token_product(
    x_planes, words, scale, y, pairs, block_expert, block_first, block_end, divisor, split_stride, out, plane_width, row_words, groups,
    BITS: tl.constexpr, PLANES: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """x_planes [*, PLANES, plane_width], words int32 [E, out, row_words], scale bf16 [E, out, groups]; STEP units are a
    group -> y fp32 [SPLITS, pairs, out]. A block is one pair."""
    if is_empty(block_first, block_end):
        return
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, 1)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there_row = row < out
    matrix_row = expert * out + row
    UNIT: tl.constexpr = 1 if 32 % BITS == 0 else BITS  # words
    FACTOR: tl.constexpr = 2 if BITS == 1 else 1
    MIDDLE: tl.constexpr = 0.5 if BITS == 1 else (1.5 if BITS == 2 else 2.0 ** (BITS - 1))
    row_start = words + matrix_row[:, None] * row_words
    x_start = x_planes + tl.sum(x_row, axis=0) * PLANES * plane_width
    acc = tl.zeros((ROWS, STEP), tl.float32)
    begin, end = share(groups, 1, SPLITS)
    for group in tl.range(begin, end, num_stages=STAGES):
        unit = group * STEP + tl.arange(0, STEP)
        mask = there_row[:, None] & (unit[None, :] < plane_width)
        part = tl.zeros((ROWS, STEP), tl.float32)
        total = tl.zeros((STEP,), tl.float32)
        low = tl.load(row_start + unit[None, :] * UNIT, mask=mask, other=0).to(tl.uint32, bitcast=True)
        high = low
        for word in tl.static_range(UNIT):
            if word + 1 < UNIT:
                high = tl.load(row_start + unit[None, :] * UNIT + word + 1, mask=mask, other=0).to(
                    tl.uint32, bitcast=True
                )
            for code in tl.static_range(PLANES):
                if code * BITS // 32 == word:
                    inputs = tl.load(x_start + code * plane_width + unit, mask=unit < plane_width, other=0).to(
                        tl.float32
                    )
                    part += mantissa(low, high, code, BITS) * inputs[None, :]
                    total += inputs
            low = high
        factor = tl.load(scale + matrix_row * groups + group, mask=there_row, other=0).to(tl.float32)
        acc += (part - (1 + MIDDLE / (1 << BITS)) * total[None, :]) * (factor * (FACTOR * (1 << BITS)))[:, None]
    sums = tl.sum(acc, axis=1)
    store_sums(y, sums[:, None], pair, there, row, out, split_stride)


@triton.jit
def exact(code, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """Codes as DTYPE, in bf16 plus 128. (In fp16 it would be 1024, too far from a code for sums to be good.)"""
    if DTYPE == tl.bfloat16 and BITS < 8:
        return (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return code.to(tl.float32).to(DTYPE)


@triton.jit
def int_product(
    x, codes, scale, y, pairs, block_expert, block_first, block_end, divisor, split_stride, out, width, row_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [*, width], codes uint8 [E, out, row_bytes], scale bf16 [E, out, groups] -> y fp32 [SPLITS, pairs, out]."""
    if is_empty(block_first, block_end):
        return
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there_row = row < out
    matrix_row = expert * out + row
    DTYPE: tl.constexpr = x.dtype.element_ty
    FACTOR: tl.constexpr = 2 if BITS == 1 else 1
    MIDDLE: tl.constexpr = 0.5 if BITS == 1 else (1.5 if BITS == 2 else 2.0 ** (BITS - 1))
    OFFSET: tl.constexpr = 128 if DTYPE == tl.bfloat16 and BITS < 8 else 0
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    begin, end = share(width, COLUMNS, SPLITS)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        code = code_tile(codes + matrix_row[:, None] * row_bytes, first, there_row[:, None], row_bytes, COLUMNS, BITS)
        mask = there[None, :] & (column[:, None] < width)
        inputs = tl.load(x + x_row[None, :] * width + column[:, None], mask=mask, other=0)
        if GROUP % COLUMNS == 0:
            part = tl.dot(
                operand(exact(code, DTYPE, BITS), DTYPE, WIDE), operand(inputs, DTYPE, WIDE), input_precision="ieee"
            )
            total = tl.sum(inputs.to(tl.float32), axis=0)
            factor = (
                tl.load(scale + matrix_row * groups + first // GROUP, mask=there_row, other=0).to(tl.float32) * FACTOR
            )
            acc += (part - (OFFSET + MIDDLE) * total[None, :]) * factor[:, None]
        else:
            mask = there_row[:, None] & (column[None, :] < width)
            factor = tl.load(scale + matrix_row[:, None] * groups + column[None, :] // GROUP, mask=mask, other=0)
            values = level(code, BITS) * factor.to(tl.float32)
            acc = tl.dot(operand(values, DTYPE, WIDE), operand(inputs, DTYPE, WIDE), acc, input_precision="ieee")
    store_sums(y, acc, pair, there, row, out, split_stride)


_POINTERS = BLOCK_POINTERS | {"scale": "bf16", "y": "fp32"}
CASES = tuple(
    Case(
        f"int{bits}, a token",
        int_token_product,
        config := token_config(bits),
        _POINTERS | {"x_planes": "bf16", "words": "i32"},
        {"BITS": bits, "PLANES": codes_in_unit(bits), "STEP": 128 // codes_in_unit(bits), "ROWS": config.rows}
        | {"SPLITS": config.splits, "STAGES": config.stages},
        dots=False,
    )
    for bits in (8, 4, 3, 2, 1)
) + tuple(
    Case(
        f"int{bits}",
        int_product,
        config,
        _POINTERS | {"x": "bf16", "codes": "u8"},
        {"BITS": bits, "GROUP": 128, "TOKENS": config.tokens, "ROWS": config.rows, "COLUMNS": config.columns}
        | {"SPLITS": config.splits, "WIDE": False},
    )
    for bits in (8, 4, 3, 2, 1)
    for config in CONFIGS
)
