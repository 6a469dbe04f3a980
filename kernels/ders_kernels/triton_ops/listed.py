"""Kept entries by a list of their columns, for few tokens: y = x @ D.T gathers each token's inputs there.

The columns are worked out once from what is stored (kept.py, elias_fano.py), two bytes an entry, and nothing is
multiplied that is 0. At one token the mask of drop0.9 costs five times as long to draw again as the list to read.
"""

import triton
import triton.language as tl

from .config import BLOCK_POINTERS, Case, Config
from .kept import kept_value
from .tiles import block_of, is_empty, store_sums

CONFIGS = (Config(1, 4, 128, 1, 1), Config(4, 2, 128, 1, 1))


@triton.jit
def listed_product(
    x, columns, values, scale, y, pairs, block_expert, block_first, block_end, divisor,
    split_stride, out, width, kept, value_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [*, width], columns int16 or int32 [E, out, kept] (`width`: none), values as in kept.py -> y fp32 [1, pairs, out]."""
    if is_empty(block_first, block_end):
        return
    expert, pair, x_row, there = block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix_row = expert * out + row
    acc = tl.zeros((ROWS, COLUMNS, TOKENS), tl.float32)
    for first in range(0, kept, COLUMNS):
        place = first + tl.arange(0, COLUMNS)[None, :]
        inside = (row[:, None] < out) & (place < kept)
        column = tl.load(columns + matrix_row[:, None] * kept + place, mask=inside, other=0).to(tl.int32)
        real = inside & (column >= 0) & (column < width)
        value = kept_value(values, scale, matrix_row, place, real, kept, value_bytes, groups, BITS, GROUP)
        at = x + x_row[None, None, :] * width + column[:, :, None]
        inputs = tl.load(at, mask=real[:, :, None] & there[None, None, :], other=0).to(tl.float32)
        acc += value[:, :, None] * inputs
    store_sums(y, tl.sum(acc, axis=1), pair, there, row, out, split_stride)


CASES = tuple(
    Case(
        name,
        listed_product,
        config,
        BLOCK_POINTERS | {"x": "bf16", "columns": "i16", "values": kind, "scale": "bf16", "y": "fp32"},
        {"BITS": bits, "GROUP": 128, "TOKENS": config.tokens, "ROWS": config.rows, "COLUMNS": config.columns},
        dots=False,
    )
    for name, kind, bits in (("kept by list", "bf16", 0), ("ternary by list", "u8", 1))
    for config in CONFIGS
)
