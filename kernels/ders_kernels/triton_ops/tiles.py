"""What kernels share on a tile: numbers out of bits, draws, rounding. Shapes are [rows, columns] of W."""

import triton
import triton.language as tl


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
def unpacked(packed, BITS: tl.constexpr):
    """Bytes [rows, n] -> their codes [rows, n * 8 / BITS] in order, int32; BITS is 1, 2, 4 or 8."""
    packed = packed.to(tl.int32)
    if BITS == 8:
        return packed
    elif BITS == 4:
        return interleaved(packed & 15, packed >> 4)
    elif BITS == 2:
        return interleaved4(packed & 3, (packed >> 2) & 3, (packed >> 4) & 3, packed >> 6)
    else:
        even = interleaved4(packed & 1, (packed >> 2) & 1, (packed >> 4) & 1, (packed >> 6) & 1)
        odd = interleaved4((packed >> 1) & 1, (packed >> 3) & 1, (packed >> 5) & 1, packed >> 7)
        return interleaved(even, odd)


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
    """fp32 -> DTYPE to nearest even; bf16 by its bits, since Triton's interpreter cuts instead of rounding."""
    if DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, quiet, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


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
def store_sums(y, acc, pair, there, row, out, ADD: tl.constexpr):
    """acc [rows, tokens] fp32 -> y [pairs, out], added to what is there if ADD."""
    at = y + pair[None, :] * out + row[:, None]
    mask = there[None, :] & (row[:, None] < out)
    if ADD:
        acc += tl.load(at, mask=mask, other=0)
    tl.store(at, acc, mask=mask)
