"""The counter generator by itself, to be compared with counter_rng.py."""

import triton
import triton.language as tl

from .config import Case, Config
from .tiles import draw_tile

CONFIG = Config(0, 1, 1024, 4, 1)


@triton.jit
def fill(keys, out, width, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """keys int64 [1] -> out int64 [rows, width]: draws of the elements of a matrix."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    first = tl.program_id(1) * COLUMNS
    drawn = draw_tile(tl.load(keys), row, width, first, COLUMNS, ALIGNED)
    column = first + tl.arange(0, COLUMNS)
    tl.store(out + row[:, None] * width + column[None, :], drawn.to(tl.int64), mask=column[None, :] < width)


CASES = (
    Case(
        "draws", fill, CONFIG, {"keys": "i64", "out": "i64"}, {"COLUMNS": CONFIG.columns, "ALIGNED": True}, dots=False
    ),
)
