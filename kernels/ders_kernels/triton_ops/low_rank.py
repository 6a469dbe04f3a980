"""Low rank: y = (x @ right.T) @ left.T, for every expert's pairs.

`right_product` has few rows and long ones, so its columns are split among programs; `left_product` adds up what they
leave. Two kernels, since every row of left needs all of x @ right.T.
"""

import triton
import triton.language as tl

from .config import BLOCK_POINTERS, Case, Config
from .tiles import block_of, is_empty, narrow, operand, share, store_sums

RIGHT = (Config(16, 16, 256, 4, 3, splits=8), Config(64, 16, 128, 4, 3, splits=2))
LEFT = (Config(16, 64, 16, 4, 2), Config(64, 64, 16, 4, 2))


@triton.jit
def right_product(
    x, right, inner, pairs, block_expert, block_first, block_end, divisor, split_stride, rank, width,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [*, width], right [E, rank, width] -> inner fp32 [SPLITS, pairs, rank]."""
    if is_empty(block_first, block_end):
        return
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    factor = right + (expert * rank + row[:, None]) * width
    DTYPE: tl.constexpr = x.dtype.element_ty
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    begin, end = share(width, COLUMNS, SPLITS)
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        values = tl.load(factor + column[None, :], mask=(row[:, None] < rank) & (column[None, :] < width), other=0)
        mask = there[None, :] & (column[:, None] < width)
        inputs = tl.load(x + x_row[None, :] * width + column[:, None], mask=mask, other=0)
        acc = tl.dot(operand(values, DTYPE, WIDE), operand(inputs, DTYPE, WIDE), acc, input_precision="ieee")
    store_sums(inner, acc, pair, there, row, rank, split_stride)


@triton.jit
def left_product(
    inner, left, y, pairs, block_expert, block_first, block_end, split_stride, out, rank, splits,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """inner fp32 [splits, pairs, rank], left [E, out, rank] -> y fp32 [1, pairs, out]; inner goes in as left's dtype."""
    if is_empty(block_first, block_end):
        return
    expert, pair, _, there = block_of(block_expert, block_first, block_end, pairs, 1, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    DTYPE: tl.constexpr = left.dtype.element_ty
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, rank, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = there[None, :] & (column[:, None] < rank)
        inputs = tl.zeros((COLUMNS, TOKENS), tl.float32)
        for split in range(0, splits):
            at = inner + split * split_stride + pair[None, :] * rank + column[:, None]
            inputs += tl.load(at, mask=mask, other=0)
        mask = (row[:, None] < out) & (column[None, :] < rank)
        values = tl.load(left + (expert * out + row[:, None]) * rank + column[None, :], mask=mask, other=0)
        narrowed = operand(narrow(inputs, DTYPE), DTYPE, WIDE)
        acc = tl.dot(operand(values, DTYPE, WIDE), narrowed, acc, input_precision="ieee")
    store_sums(y, acc, pair, there, row, out, 0)


CASES = tuple(
    Case(
        "rank, right",
        right_product,
        config,
        BLOCK_POINTERS | {"x": "bf16", "right": "bf16", "inner": "fp32"},
        {
            "TOKENS": config.tokens,
            "ROWS": config.rows,
            "COLUMNS": config.columns,
            "SPLITS": config.splits,
            "WIDE": False,
        },
    )
    for config in RIGHT
) + tuple(
    Case(
        "rank, left",
        left_product,
        config,
        BLOCK_POINTERS | {"inner": "fp32", "left": "bf16", "y": "fp32"},
        {"TOKENS": config.tokens, "ROWS": config.rows, "COLUMNS": config.columns, "WIDE": False},
    )
    for config in LEFT
)
