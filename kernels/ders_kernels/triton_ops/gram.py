"""Inner products of every two experts, in one pass: G = W W.T of W [E, n], n up to billions.

A program has a chunk of the columns and two tiles of experts; its fp32 sums are added up in fp64.
"""

import triton
import triton.language as tl

from .config import Case, Config
from .tiles import operand

CONFIGS = (Config(16, 16, 256, 4, 3), Config(64, 64, 128, 4, 3))
CHUNK = 1 << 15  # columns of a program: their sum in fp32 is off by about 1e-6


@triton.jit
def gram(
    experts, sums, count, width, TILE: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr
):
    """experts [count, width] -> sums fp32 [chunks, count, count]."""
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    other = tl.program_id(2) * TILE + tl.arange(0, TILE)
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    acc = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, CHUNK, COLUMNS):
        column = begin + first + tl.arange(0, COLUMNS)
        left = tl.load(
            experts + row[:, None].to(tl.int64) * width + column[None, :],
            mask=(row[:, None] < count) & (column[None, :] < width),
            other=0,
        )
        right = tl.load(
            experts + other[None, :].to(tl.int64) * width + column[:, None],
            mask=(other[None, :] < count) & (column[:, None] < width),
            other=0,
        )
        acc = tl.dot(
            operand(left, experts.dtype.element_ty, WIDE),
            operand(right, experts.dtype.element_ty, WIDE),
            acc,
            input_precision="ieee",
        )
    at = sums + (tl.program_id(0).to(tl.int64) * count + row[:, None]) * count + other[None, :]
    tl.store(at, acc, mask=(row[:, None] < count) & (other[None, :] < count))


CASES = tuple(
    Case(
        "Gram",
        gram,
        config,
        {"experts": "bf16", "sums": "fp32"},
        {"TILE": config.tokens, "COLUMNS": config.columns, "CHUNK": CHUNK, "WIDE": False},
    )
    for config in CONFIGS
)
