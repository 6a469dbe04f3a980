"""Kept entries whose positions are Elias-Fano coded (ternary, top of few): columns, and W, straight from the coded bits.

Bit b of a row's `high`, if set and the i-th that is, says column (b - i) << l | low_i (packing.py). A program goes
through the bits of its rows with a count of those set: about two and a half bits are looked at for each entry.
"""

import triton
import triton.language as tl

from .config import Case, Config
from .kept import kept_value
from .tiles import code_at, narrow

CONFIG = Config(0, 4, 128, 4, 1)


@triton.jit
def entries(
    low, high, matrix_row, row, first, before, out, low_bytes, high_bytes, LOW: tl.constexpr, COLUMNS: tl.constexpr
):
    """Bits first ... of `high`: which are set, their places in the row, columns, each [rows, COLUMNS]; `before` counted on."""
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
    return found, place, column, before + tl.sum(count, axis=1)


@triton.jit
def elias_fano_columns(
    low, high, columns, out, kept, low_bytes, high_bytes, LOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """low uint8 [E, out, low_bytes], high uint8 [E, out, high_bytes] -> columns int16 or int32 [E, out, kept]."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix_row = tl.program_id(0).to(tl.int64) * out + row
    before = tl.zeros((ROWS,), tl.int32)
    for first in range(0, high_bytes * 8, COLUMNS):
        found, place, column, before = entries(
            low, high, matrix_row, row, first, before, out, low_bytes, high_bytes, LOW, COLUMNS
        )
        tl.store(
            columns + matrix_row[:, None] * kept + place,
            column.to(columns.dtype.element_ty),
            mask=found & (place < kept),
        )


@triton.jit
def elias_fano_weight(
    base, weight, low, high, values, scale, expert, out, width, kept, low_bytes, high_bytes, value_bytes, groups,
    LOW: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """weight [out, width], which holds the base already: round(base + D) is put where there are entries."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix_row = (tl.zeros((), tl.int64) + expert) * out + row
    before = tl.zeros((ROWS,), tl.int32)
    for first in range(0, high_bytes * 8, COLUMNS):
        found, place, column, before = entries(
            low, high, matrix_row, row, first, before, out, low_bytes, high_bytes, LOW, COLUMNS
        )
        real = found & (place < kept) & (column >= 0) & (column < width)  # else an unused slot
        value = kept_value(values, scale, matrix_row, place, real, kept, value_bytes, groups, BITS, GROUP)
        at = row[:, None].to(tl.int64) * width + column
        stored = tl.load(base + at, mask=real, other=0).to(tl.float32)
        tl.store(weight + at, narrow(stored + value, weight.dtype.element_ty), mask=real)


_POINTERS = {"low": "u8", "high": "u8"}
_TILE = {"LOW": 5, "ROWS": CONFIG.rows, "COLUMNS": CONFIG.columns}
CASES = (
    Case("Elias-Fano, columns", elias_fano_columns, CONFIG, _POINTERS | {"columns": "i16"}, _TILE, dots=False),
    Case(
        "Elias-Fano, W",
        elias_fano_weight,
        CONFIG,
        _POINTERS | {"base": "bf16", "weight": "bf16", "values": "u8", "scale": "bf16"},
        _TILE | {"BITS": 1, "GROUP": 128},
        dots=False,
    ),
)
