"""y = x @ W_e.T with stored matrices: the base of all experts (one matrix), low-rank factors, synthesised experts."""

import triton
import triton.language as tl

from .config import Config
from .tiles import block_of, operand, store_sums

CONFIGS = (Config(16, 32, 256, 4, 3), Config(32, 64, 128, 4, 3), Config(64, 64, 128, 4, 3), Config(128, 128, 64, 8, 3))


@triton.jit
def dense_product(
    x, weight, y, pairs, block_expert, block_first, block_end, divisor, out, width, expert_stride,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [*, width], weight [E, out, width], or [out, width] with expert_stride 0 -> y fp32 [pairs, out]."""
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix = weight + expert * expert_stride + row[:, None].to(tl.int64) * width
    inputs_row = x + x_row[None, :] * width
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, width, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        values = tl.load(matrix + column[None, :], mask=(row[:, None] < out) & (column[None, :] < width), other=0)
        inputs = tl.load(inputs_row + column[:, None], mask=there[None, :] & (column[:, None] < width), other=0)
        acc = tl.dot(operand(values, x.dtype.element_ty, WIDE), operand(inputs, x.dtype.element_ty, WIDE), acc, input_precision="ieee")
    store_sums(y, acc, pair, there, row, out, ADD)
