"""Published layouts of small integers and of sets of positions; each row is on its own and starts on a byte.

**Codes** of b bits: code i of a row takes bits i*b ... i*b+b-1 of the row's bytes, lowest bit first. Where a row's
bits fill whole 32-bit words, the bytes are those of compressed-tensors' `weight_packed` (int32, little-endian).

**Positions**: n columns in ascending order out of 0..m (m itself means "unused" and may repeat), in the smaller of
  bitmap      m bits, bit c set if column c is in the set                        (only where no slot is unused)
  Elias-Fano  the low l bits of each column as codes of l bits ("low"), and a bit string ("high") of
              n + (m >> l) + 1 bits in which bit (column_i >> l) + i is set for the i-th column.
l is the smallest of those that make n*l + n + (m >> l) + 1 least. The size depends on n and m alone, and is within
0.6 bits per position of the least that any code needs (Elias 1974, Fano 1971).
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .jit import njit


def code_bytes(count: int, bits: int) -> int:
    """Bytes of one row of `count` codes."""
    return (count * bits + 7) // 8


@njit(nogil=True, cache=True, inline="always")
def pack_row(codes, bits, out):
    """uint8 codes [n] -> uint8 bytes [ceil(n*bits/8)]."""
    n = codes.size
    if bits == 8:
        for i in range(n):
            out[i] = codes[i]
        return
    if bits == 4:
        for i in range(n // 2):
            out[i] = codes[2 * i] | (codes[2 * i + 1] << 4)
        if n % 2:
            out[n // 2] = codes[n - 1]
        return
    held, filled, at = np.uint32(0), 0, 0
    for i in range(n):
        held |= np.uint32(codes[i]) << np.uint32(filled)
        filled += bits
        while filled >= 8:
            out[at] = np.uint8(held & np.uint32(0xFF))
            held >>= np.uint32(8)
            filled -= 8
            at += 1
    if filled:
        out[at] = np.uint8(held)


@njit(nogil=True, cache=True, inline="always")
def unpack_row(packed, bits, codes):
    """uint8 bytes -> uint8 codes [n]."""
    n = codes.size
    if bits == 8:
        for i in range(n):
            codes[i] = packed[i]
        return
    if bits == 4:
        for i in range(n // 2):
            codes[2 * i] = packed[i] & 15
            codes[2 * i + 1] = packed[i] >> 4
        if n % 2:
            codes[n - 1] = packed[n // 2] & 15
        return
    if bits <= 2:
        _unpack_bytes(packed, bits, codes)
        return
    if bits == 3:  # a constant, which the compiler unrolls
        _unpack_eights(packed, 3, codes)
    else:
        _unpack_eights(packed, bits, codes)


@njit(nogil=True, cache=True)
def _unpack_eights(packed, bits, codes):
    """Codes of 3, 5, 6 or 7 bits: eight are `bits` bytes."""
    n = codes.size
    mask, whole = np.uint64((1 << bits) - 1), n // 8
    for i in range(whole):
        held, begin = np.uint64(0), i * bits
        for j in range(bits):
            held |= np.uint64(packed[begin + j]) << np.uint64(8 * j)
        for j in range(8):
            codes[8 * i + j] = np.uint8((held >> np.uint64(bits * j)) & mask)
    held = np.uint64(0)
    for j in range(whole * bits, packed.size):
        held |= np.uint64(packed[j]) << np.uint64(8 * (j - whole * bits))
    for i in range(whole * 8, n):
        codes[i] = np.uint8((held >> np.uint64(bits * (i - whole * 8))) & mask)


@njit(nogil=True, cache=True)
def _unpack_bytes(packed, bits, codes):
    """Codes of 1 or 2 bits, of which a byte has 8 or 4."""
    mask, n = np.uint8((1 << bits) - 1), codes.size
    if bits == 1:
        for i in range(n // 8):
            for j in range(8):
                codes[8 * i + j] = (packed[i] >> np.uint8(j)) & mask
    else:
        for i in range(n // 4):
            for j in range(4):
                codes[4 * i + j] = (packed[i] >> np.uint8(2 * j)) & mask
    each = 8 // bits
    for i in range(n - n % each, n):
        codes[i] = (packed[n // each] >> np.uint8(bits * (i % each))) & mask


def low_bits(n: int, m: int) -> int:
    """The l of Elias-Fano for n columns in 0..m."""
    return min(range(m.bit_length() + 1), key=lambda low: (n * low + n + (m >> low) + 1, low))


def position_bytes(n: int, m: int, unused: bool) -> dict[str, int]:
    """Bytes per row of each position part: {"bitmap"} or {"low", "high"} ("low" is left out where it has no bits)."""
    low = low_bits(n, m)
    parts = {"low": code_bytes(n, low), "high": code_bytes(n + (m >> low) + 1, 1)}
    if not unused and (m + 7) // 8 <= sum(parts.values()):
        return {"bitmap": (m + 7) // 8}
    return {part: size for part, size in parts.items() if size}


@intrinsic
def lowest_bit(typing_context, word):
    """Number of the lowest set bit of a uint64, 64 without any; one instruction."""

    def build(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), build


@intrinsic
def count_bits(typing_context, word):
    """How many bits of a uint64 are set; one instruction."""

    def build(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), build


@njit(nogil=True, cache=True)
def pack_flags(flags, out):
    """uint8 flags of 0 or 1, 8 for each byte of out -> uint8 out, bit i flag i."""
    words = flags.view(np.uint64)
    for i in range(out.size):  # the product moves bit 0 of byte i to bit 56 + i
        out[i] = np.uint8((words[i] * np.uint64(0x0102040810204080)) >> np.uint64(56))


@njit(nogil=True, cache=True)
def _pack_codes(codes, bits, out):
    """uint8 codes of 1 ... 8 bits, zeros up to a whole eight -> uint8 bytes [ceil(n * bits / 8)]: pack_row by eights."""
    for i in range(out.size // bits):
        held = np.uint64(0)
        for j in range(8):
            held |= np.uint64(codes[8 * i + j]) << np.uint64(bits * j)
        for j in range(bits):
            out[i * bits + j] = np.uint8((held >> np.uint64(8 * j)) & np.uint64(0xFF))
    done, held = out.size // bits, np.uint64(0)
    if done * bits < out.size:
        for j in range(8):
            held |= np.uint64(codes[8 * done + j]) << np.uint64(bits * j)
        for at in range(done * bits, out.size):
            out[at] = np.uint8((held >> np.uint64(8 * (at - done * bits))) & np.uint64(0xFF))


@njit(nogil=True, cache=True)
def _pack_bitmap(columns, bitmap):
    flags = np.zeros(bitmap.shape[1] * 8, np.uint8)
    for row in range(columns.shape[0]):
        for i in range(columns.shape[1]):
            flags[columns[row, i]] = 1
        pack_flags(flags, bitmap[row])
        flags[:] = 0


@njit(nogil=True, cache=True)
def _pack_positions(columns, low_count, low, high):
    """Elias-Fano, for low_count <= 8 by bytes: a flag for each bit of high and a code for each column; else bit by bit."""
    n = columns.shape[1]
    flags, codes = np.zeros(high.shape[1] * 8, np.uint8), np.zeros(n + 8, np.uint8)
    for row in range(columns.shape[0]):
        for i in range(n):
            flags[(columns[row, i] >> low_count) + i] = 1
        pack_flags(flags, high[row])
        flags[:] = 0
        if low_count <= 8:
            for i in range(n):
                codes[i] = columns[row, i] & ((1 << low_count) - 1)
            if low_count:
                _pack_codes(codes, low_count, low[row])
            continue
        for i in range(n):
            for j in range(low_count):
                bit = i * low_count + j
                low[row, bit >> 3] |= np.uint8(((columns[row, i] >> j) & 1) << (bit & 7))


@njit(nogil=True, cache=True)
def _unpack_positions(low, high, low_count, m, unused, columns):
    """-1 if well formed, else the first bad row."""
    n = columns.shape[1]
    bits, codes = np.empty(high.shape[1] * 8, np.uint8), np.zeros(n, np.uint8)
    places = np.empty(bits.size + 1, np.int32)
    for row in range(columns.shape[0]):
        line = columns[row]
        unpack_row(high[row], 1, bits)
        found = 0
        for bit in range(bits.size):  # every place is written, and kept by moving on: no branch to mispredict
            places[found] = bit
            found += bits[bit]
        if found != n:
            return row
        if 0 < low_count <= 8:
            unpack_row(low[row], low_count, codes)
        for i in range(n):
            line[i] = ((places[i] - i) << low_count) | codes[i]
        for i in range(n if low_count > 8 else 0):
            for j in range(low_count):
                at = i * low_count + j
                line[i] |= ((np.int32(low[row, at >> 3]) >> (at & 7)) & 1) << j
        wrong = n > 0 and line[n - 1] >= m + unused
        for i in range(1, n):
            wrong |= (line[i] <= line[i - 1]) & (line[i] < m) | (line[i] < line[i - 1])
        if wrong:
            return row
    return -1


@njit(nogil=True, cache=True)
def unpack_bitmap(bitmap, m, columns):
    """(-1, n) if every row has the n bits that `columns` has room for, else the first row that hasn't, and its bits."""
    line, bits = np.empty(m + 1, np.int32), np.empty(bitmap.shape[1] * 8, np.uint8)
    for row in range(bitmap.shape[0]):
        unpack_row(bitmap[row], 1, bits)
        at, past = 0, 0
        for i in range(m):  # every column is written, and kept by moving on: no branch to mispredict
            line[at] = i
            at += bits[i]
        for i in range(m, bits.size):
            past += bits[i]
        if at != columns.shape[1] or past:
            return row, at + past
        columns[row] = line[:at]
    return -1, columns.shape[1]


def pack_positions(columns: np.ndarray, m: int, unused: bool) -> dict[str, np.ndarray]:
    """int32 [rows, n], ascending in each row -> uint8 parts [rows, bytes]."""
    rows, n = columns.shape
    sizes = position_bytes(n, m, unused)
    parts = {part: np.zeros((rows, size), np.uint8) for part, size in sizes.items()}
    if "bitmap" in parts:
        _pack_bitmap(columns, parts["bitmap"])
        return parts
    _pack_positions(columns, low_bits(n, m), parts.get("low", np.zeros((rows, 0), np.uint8)), parts["high"])
    return parts


def unpack_positions(parts: dict[str, np.ndarray], n: int, m: int, unused: bool, first_row: int = 0) -> np.ndarray:
    """uint8 parts -> int32 [rows, n]. Raises ValueError naming the row (from first_row on) whose bits are no such set."""
    if "bitmap" in parts:
        columns = np.empty((parts["bitmap"].shape[0], n), np.int32)
        bad, count = unpack_bitmap(parts["bitmap"], m, columns)
        if bad >= 0:
            raise ValueError(f"row {first_row + bad}: bitmap has {count} columns of 0..{m - 1}, expected {n}")
        return columns
    high = parts["high"]
    columns = np.empty((high.shape[0], n), np.int32)
    low = parts.get("low", np.zeros((high.shape[0], 0), np.uint8))
    bad = _unpack_positions(low, high, low_bits(n, m), m, unused, columns)
    if bad >= 0:
        raise ValueError(
            f"row {first_row + bad}: positions are not {n} ascending columns of 0..{m if unused else m - 1}"
        )
    return columns
