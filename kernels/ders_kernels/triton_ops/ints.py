"""Integers: y = x @ D.T with D = level(code) * scale, and y = x @ round(B + D).T.

Apart (`int_product`): a byte's codes are multiplied in planes, plane j with the inputs j, j + n, ... (n codes in a byte),
so nothing is shuffled: each stored byte is loaded once and its codes become operands where they are. Where a step of
the loop is within one group, levels go into the product, exact in any dtype, and the scale is put on the sums.
Whole (`int_whole_product`): codes are put in order, added to the base's tile and rounded to the base's dtype, the very
weights of `ders restore`; one product with them instead of two, for many tokens.
"""

import triton
import triton.language as tl

from .config import Config
from .tiles import block_of, code_at, level, narrow, operand, store_sums, unpacked

# tokens of an expert: 1-16, 17-32, more. Widths of a step divide the usual group of 128.
APART = (Config(16, 32, 128, 4, 4), Config(32, 64, 128, 4, 3), Config(64, 64, 128, 4, 3))
WHOLE = (Config(16, 32, 128, 4, 3), Config(64, 64, 64, 4, 3), Config(128, 128, 64, 8, 3))


@triton.jit
def int_product(
    x, codes, scale, y, pairs, block_expert, block_first, block_end, divisor, out, width, row_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [*, width], codes [E, out, row_bytes] uint8, scale [E, out, groups] bf16 -> y fp32 [pairs, out]."""
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there_row = row < out
    matrix_row = expert * out + row
    DTYPE: tl.constexpr = x.dtype.element_ty
    PLANES: tl.constexpr = 8 // BITS if 8 % BITS == 0 else 1
    STEP: tl.constexpr = COLUMNS // PLANES  # bytes of a step, or codes where these straddle bytes
    ONE_SCALE: tl.constexpr = GROUP % COLUMNS == 0
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, tl.cdiv(width, PLANES), STEP):
        part = tl.zeros((ROWS, TOKENS), tl.float32)
        at = first + tl.arange(0, STEP)
        if 8 % BITS == 0:
            there_byte = there_row[:, None] & (at[None, :] < row_bytes)
            packed = tl.load(codes + matrix_row[:, None] * row_bytes + at[None, :], mask=there_byte, other=0).to(tl.int32)
        else:
            there_code = there_row[:, None] & (at[None, :] < width)
            packed = code_at(codes + matrix_row[:, None] * row_bytes, at[None, :], there_code, BITS)
        for plane in tl.static_range(PLANES):
            column = at * PLANES + plane
            inputs = tl.load(x + x_row[None, :] * width + column[:, None], mask=there[None, :] & (column[:, None] < width), other=0)
            values = level((packed >> (plane * BITS)) & ((1 << BITS) - 1), BITS)
            if not ONE_SCALE:
                there_scale = there_row[:, None] & (column[None, :] < width)
                values *= tl.load(scale + matrix_row[:, None] * groups + column[None, :] // GROUP, mask=there_scale, other=0).to(tl.float32)
            part = tl.dot(operand(values, DTYPE, WIDE), operand(inputs, DTYPE, WIDE), part, input_precision="ieee")
        if ONE_SCALE:
            factor = tl.load(scale + matrix_row * groups + first * PLANES // GROUP, mask=there_row, other=0).to(tl.float32)
            acc += part * factor[:, None]
        else:
            acc += part
    store_sums(y, acc, pair, there, row, out, ADD)


@triton.jit
def int_whole_product(
    x, base, codes, scale, y, pairs, block_expert, block_first, block_end, divisor, out, width, row_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """As `int_product`, with base [out, width]: y = x @ round(base + D).T."""
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there_row = row < out
    matrix_row = expert * out + row
    DTYPE: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        there_weight = there_row[:, None] & (column[None, :] < width)
        if 8 % BITS == 0:
            at = first * BITS // 8 + tl.arange(0, COLUMNS * BITS // 8)
            there_byte = there_row[:, None] & (at[None, :] < row_bytes)
            packed = unpacked(tl.load(codes + matrix_row[:, None] * row_bytes + at[None, :], mask=there_byte, other=0), BITS)
        else:
            packed = code_at(codes + matrix_row[:, None] * row_bytes, column[None, :], there_weight, BITS)
        if GROUP % COLUMNS == 0:
            factor = tl.load(scale + matrix_row * groups + first // GROUP, mask=there_row, other=0).to(tl.float32)[:, None]
        else:
            factor = tl.load(scale + matrix_row[:, None] * groups + column[None, :] // GROUP, mask=there_weight, other=0).to(tl.float32)
        stored = tl.load(base + row[:, None].to(tl.int64) * width + column[None, :], mask=there_weight, other=0)
        weight = narrow(stored.to(tl.float32) + level(packed, BITS) * factor, base.dtype.element_ty)
        inputs = tl.load(x + x_row[None, :] * width + column[:, None], mask=there[None, :] & (column[:, None] < width), other=0)
        acc = tl.dot(operand(weight, DTYPE, WIDE), operand(inputs, DTYPE, WIDE), acc, input_precision="ieee")
    store_sums(y, acc, pair, there, row, out, False)
