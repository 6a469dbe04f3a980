"""W = round(fp32(B) + D) for integers and low rank: the bits of `ders restore`. The other two are in kept.py, elias_fano.py."""

import triton
import triton.language as tl

from .config import Case, Config
from .tiles import code_tile, level, narrow

CONFIG = Config(0, 16, 128, 4, 1)


@triton.jit
def int_weight(
    base, weight, codes, scale, expert, out, width, row_bytes, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """base [out, width], codes uint8 [E, out, row_bytes], scale bf16 [E, out, groups] -> weight [out, width]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    there_row = row < out
    inside = there_row[:, None] & (column[None, :] < width)
    matrix_row = (tl.zeros((), tl.int64) + expert) * out + row
    code = code_tile(codes + matrix_row[:, None] * row_bytes, first, there_row[:, None], row_bytes, COLUMNS, BITS)
    if GROUP % COLUMNS == 0:
        factor = tl.load(scale + matrix_row * groups + first // GROUP, mask=there_row, other=0).to(tl.float32)[:, None]
    else:
        at = scale + matrix_row[:, None] * groups + column[None, :] // GROUP
        factor = tl.load(at, mask=inside, other=0).to(tl.float32)
    at = row[:, None].to(tl.int64) * width + column[None, :]
    stored = tl.load(base + at, mask=inside, other=0).to(tl.float32)
    tl.store(weight + at, narrow(stored + level(code, BITS) * factor, weight.dtype.element_ty), mask=inside)


@triton.jit
def low_rank_weight(base, weight, left, right, expert, out, width, rank, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """left [E, out, rank], right [E, rank, width]: summed from rank 0 up, as the codec decodes.

    A product of two bf16 is exact in fp32, so fusing it with the addition changes nothing; of wider factors it does.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there_row, there_column = row < out, column < width
    matrix = tl.zeros((), tl.int64) + expert
    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    for one in range(0, rank):
        factor = tl.load(left + (matrix * out + row) * rank + one, mask=there_row, other=0).to(tl.float32)
        other = tl.load(right + (matrix * rank + one) * width + column, mask=there_column, other=0).to(tl.float32)
        change += factor[:, None] * other[None, :]
    at = row[:, None].to(tl.int64) * width + column[None, :]
    inside = there_row[:, None] & there_column[None, :]
    stored = tl.load(base + at, mask=inside, other=0).to(tl.float32)
    tl.store(weight + at, narrow(stored + change, weight.dtype.element_ty), mask=inside)


_POINTERS = {"base": "bf16", "weight": "bf16"}
_TILE = {"ROWS": CONFIG.rows, "COLUMNS": CONFIG.columns}
CASES = (
    *(
        Case(
            f"int{bits}, W",
            int_weight,
            CONFIG,
            _POINTERS | {"codes": "u8", "scale": "bf16"},
            _TILE | {"BITS": bits, "GROUP": 128},
            dots=False,
        )
        for bits in (8, 4, 3, 2, 1)
    ),
    Case("rank, W", low_rank_weight, CONFIG, _POINTERS | {"left": "bf16", "right": "bf16"}, _TILE, dots=False),
)
