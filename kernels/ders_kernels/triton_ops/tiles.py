"""What kernels share on a tile: numbers out of bits, draws, rounding. Shapes are [rows, columns] of W."""

import triton
import triton.language as tl

from .settings import INTERPRETED

ROUNDS = tl.constexpr(not INTERPRETED)


@triton.jit
def level(codes, BITS: tl.constexpr):
    """Codes -> fp32 multiples of the scale (docs/format.md, section 3, int)."""
    value = codes.to(tl.float32)
    if BITS == 1:
        return 2 * value - 1
    elif BITS == 2:
        return value - 1.5
    else:
        return value - (1 << (BITS - 1))


@triton.jit
def code_at(row_codes, place, mask, BITS: tl.constexpr):
    """Code number `place` of the rows whose bytes start at `row_codes`: int32. A code lies in one or two bytes."""
    bit = place * BITS
    low = tl.load(row_codes + bit // 8, mask=mask, other=0).to(tl.int32)
    if 8 % BITS == 0:
        return (low >> (bit % 8)) & ((1 << BITS) - 1)
    else:
        split = mask & (bit % 8 + BITS > 8)
        high = tl.load(row_codes + bit // 8 + 1, mask=split, other=0).to(tl.int32)
        return ((low | (high << 8)) >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def code_tile(row_codes, first, there_row, row_bytes, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """Codes of the columns first ... of rows whose bytes start at row_codes [rows, 1]: int32 [rows, COLUMNS].

    first and COLUMNS are multiples of 8. Every stored byte is loaded once and taken apart in registers; of 3, 5, 6 and
    7 bits, 8 codes lie in as many bytes as they have bits.
    """
    if 8 % BITS == 0:
        at = first * BITS // 8 + tl.arange(0, COLUMNS * BITS // 8)[None, :]
        byte = tl.load(row_codes + at, mask=there_row & (at < row_bytes), other=0).to(tl.int32)
        if BITS == 8:
            return byte
        elif BITS == 4:
            return interleaved(byte & 15, byte >> 4)
        elif BITS == 2:
            return interleaved4(byte & 3, (byte >> 2) & 3, (byte >> 4) & 3, byte >> 6)
        else:
            return interleaved(
                interleaved4(byte & 1, (byte >> 2) & 1, (byte >> 4) & 1, (byte >> 6) & 1),
                interleaved4((byte >> 1) & 1, (byte >> 3) & 1, (byte >> 5) & 1, byte >> 7),
            )
    else:
        unit = first // 8 * BITS + tl.arange(0, COLUMNS // 8)[None, :] * BITS
        low = _bytes(row_codes, unit, there_row, row_bytes, 0, 4 if BITS > 4 else BITS)
        high = low
        if BITS > 4:
            high = _bytes(row_codes, unit, there_row, row_bytes, 4, BITS)
        even = interleaved4(
            _split(low, high, 0, BITS),
            _split(low, high, 2, BITS),
            _split(low, high, 4, BITS),
            _split(low, high, 6, BITS),
        )
        odd = interleaved4(
            _split(low, high, 1, BITS),
            _split(low, high, 3, BITS),
            _split(low, high, 5, BITS),
            _split(low, high, 7, BITS),
        )
        return interleaved(even, odd)


@triton.jit
def _bytes(row_codes, at, there_row, row_bytes, FROM: tl.constexpr, TO: tl.constexpr):
    """Bytes FROM ... TO - 1 after `at`, as one number, lowest first; bits past 32 fall off."""
    number = tl.load(row_codes + at + FROM, mask=there_row & (at + FROM < row_bytes), other=0).to(tl.uint32)
    for byte in tl.static_range(FROM + 1, TO):
        number |= tl.load(row_codes + at + byte, mask=there_row & (at + byte < row_bytes), other=0).to(tl.uint32) << (
            8 * (byte - FROM)
        )
    return number


@triton.jit
def _split(low, high, CODE: tl.constexpr, BITS: tl.constexpr):
    """Code number CODE of 8 in the bytes that low (the first 4) and high hold."""
    BIT: tl.constexpr = CODE * BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    if BIT >= 32:
        return ((high >> (BIT - 32)) & MASK).to(tl.int32)
    elif BIT + BITS > 32:
        return (((low >> BIT) | (high << (32 - BIT))) & MASK).to(tl.int32)
    else:
        return ((low >> BIT) & MASK).to(tl.int32)


@triton.jit
def interleaved(a, b):
    """[rows, n] each -> [rows, 2n]: a0 b0 a1 b1 ..."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def interleaved4(a, b, c, d):
    """[rows, n] each -> [rows, 4n]: a0 b0 c0 d0 a1 ..."""
    return interleaved(interleaved(a, c), interleaved(b, d))


@triton.jit
def draw_tile(key, row, width, first, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """uint32 draws of elements (row [rows], first ... first + COLUMNS - 1), as counter_rng.py numbers them.

    ALIGNED: width and first are multiples of 4, so a block of four words is four neighbouring elements.
    """
    if ALIGNED:
        number = row[:, None] * width + first + tl.arange(0, COLUMNS // 4)[None, :] * 4
        a, b, c, d = _philox(key, number // 4)
        return interleaved4(a, b, c, d)
    else:
        number = row[:, None] * width + first + tl.arange(0, COLUMNS)[None, :]
        a, b, c, d = _philox(key, number // 4)
        word = number % 4
        return tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))


@triton.jit
def _philox(key, block):
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = low ^ low
    return tl.philox(key, low, high, zero, zero)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """fp32 -> DTYPE to nearest even; in Triton's interpreter, which cuts bf16 off, by its bits."""
    if ROUNDS or DTYPE != tl.bfloat16:
        return value.to(DTYPE)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def operand(value, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """An operand of a product in x's dtype; WIDE: in fp32, since Triton's interpreter can't multiply bf16."""
    if WIDE:
        return value.to(tl.float32)
    else:
        return value.to(DTYPE)


@triton.jit
def block_of(block_expert, block_first, block_end, pairs, divisor, TOKENS: tl.constexpr):
    """What program_id(0) works on: its expert, its pairs [TOKENS], their rows of x, and which of these are there."""
    block = tl.program_id(0)
    place = tl.load(block_first + block) + tl.arange(0, TOKENS)
    there = place < tl.load(block_end + block)
    pair = tl.load(pairs + place, mask=there, other=0).to(tl.int64)
    return tl.load(block_expert + block).to(tl.int64), pair, pair // divisor, there


@triton.jit
def is_empty(block_first, block_end):
    """Whether this program's block is one past the last: nothing is to be done."""
    return tl.load(block_first + tl.program_id(0)) >= tl.load(block_end + tl.program_id(0))


@triton.jit
def share(length, STEP: tl.constexpr, SPLITS: tl.constexpr):
    """begin, end of the part of 0 ... length that is program_id(2)'s of SPLITS, in whole steps."""
    own = tl.cdiv(tl.cdiv(length, STEP), SPLITS) * STEP
    begin = tl.program_id(2) * own
    return begin, tl.minimum(begin + own, length)


@triton.jit
def store_sums(y, acc, pair, there, row, out, split_stride):
    """acc [rows, tokens] fp32 -> y [splits, pairs, out], at program_id(2)."""
    at = y + tl.program_id(2).to(tl.int64) * split_stride + pair[None, :] * out + row[:, None]
    tl.store(at, acc, mask=there[None, :] & (row[:, None] < out))
