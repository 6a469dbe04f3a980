"""Group-wise integers of 1 to 8 bits: encode and decode row by row.

A group is g consecutive inputs of one row (the last may be shorter); its scale s is a bf16.
  b >= 3   s = max|d| / (2^(b-1) - 1), q = round(d * fp32(1/s)) clipped to +-(2^(b-1) - 1); value (code - 2^(b-1)) s
  b = 2    levels (-1.5, -.5, .5, 1.5) s: the level is chosen with s = max|d| / 1.5, then s by the gain rule
  b = 1    levels (-1, 1) s: sign of d, s by the gain rule
Gain rule: s = sum(d^2) / sum(level * d), so that <coded, d> = <d, d> and the delta keeps its size (DRIVE,
arXiv 2105.08339). At 1 and 2 bits no level is 0: the sign of a d = 0 is drawn, since a fixed one would be a bias.
The sums are taken in fp64 of exact products; the order of addition reaches the scale's 8 bits once in some 10^13 cases.

`encode` codes fp32 deltas of any origin, one step after the other. `encode_stored` (b >= 3) and `encode_stored_signs`
(b <= 2) make the same bytes from stored bf16 several times as fast: a row's deltas stay in the first cache, every loop
is simple enough for vector lanes, a group's scale is found while other groups are worked on, and draws are made only
for the blocks of four that hold a 0.
"""

import numpy as np

from ..counter_rng import fill, fill_blocks
from ..jit import njit
from ..packing import pack_row, unpack_row
from .floats import bf16_bits, bf16_value

_SIGN, _ABS, _INFINITE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _energy(d):
    """sum(d^2) in fp64. `reassoc` only lets the compiler add in lanes: each product is exact."""
    total = 0.0
    for i in range(d.size):
        total += np.float64(d[i]) * np.float64(d[i])
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _sign_codes(d, draws, codes):
    """The codes of 1 bit, written; sum(level * d) = sum|d|."""
    total = 0.0
    for i in range(d.size):
        codes[i] = np.uint8((d[i] > 0) | ((d[i] == 0) & (draws[i] < _SIGN)))
        total += np.float64(abs(d[i]))
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _midrise_codes(d, draws, inverse, codes):
    """The codes of 2 bits, written; sum(level * d)."""
    total = 0.0
    for i in range(d.size):
        positive = np.uint8((d[i] > 0) | ((d[i] == 0) & (draws[i] < _SIGN)))
        large = np.uint8(abs(d[i]) * inverse >= np.float32(1))
        codes[i] = np.uint8(1) + positive + positive * large - (np.uint8(1) - positive) * large
        total += np.float64(abs(d[i])) * (0.5 + large)
    return total


@njit(nogil=True, cache=True)
def encode(delta, draws, bits, group, packed, scales):
    """fp32 [rows, in], uint32 [rows, in] (only read at 1 and 2 bits) -> uint8 [rows, bytes], uint16 [rows, groups]."""
    rows, columns = delta.shape
    codes = np.empty(columns, np.uint8)
    for row in range(rows):
        d = delta[row]
        for g in range(scales.shape[1]):
            begin, end = g * group, min(columns, g * group + group)
            most = np.float32(0)
            for i in range(begin, end):
                most = max(most, abs(d[i]))
            if bits >= 3:
                top = np.float32((1 << (bits - 1)) - 1)
                scale = bf16_bits(most / top)
                scales[row, g] = scale
                step = bf16_value(scale)
                inverse = np.float32(1) / step if step > 0 else np.float32(0)
                if not np.isfinite(inverse):  # a step so small that its inverse overflows
                    inverse = np.float32(0)
                half = np.float32(1 << (bits - 1))
                for i in range(begin, end):
                    q = np.rint(d[i] * inverse)
                    codes[i] = np.uint8(min(max(q, -top), top) + half)
                continue
            inverse = np.float32(1.5) / most if most > 0 else np.float32(0)
            if not np.isfinite(inverse):
                inverse = np.float32(0)
            part, drawn, coded = d[begin:end], draws[row, begin:end], codes[begin:end]
            against = _sign_codes(part, drawn, coded) if bits == 1 else _midrise_codes(part, drawn, inverse, coded)
            scales[row, g] = bf16_bits(np.float32(_energy(part) / against)) if against > 0 else np.uint16(0)
        pack_row(codes, bits, packed[row])


@njit(nogil=True, cache=True)
def _subtract(expert, base, group, d, most):
    """Two rows of bf16 -> fp32 d and each group's largest |d| as bits; the largest of all.

    Bits, sign aside, are ordered like sizes; infinity's and then NaN's are the largest.
    """
    worst = np.uint32(0)
    for g in range(most.size):
        begin, end = g * group, min(d.size, g * group + group)
        of_expert, of_base, out = expert[begin:end], base[begin:end], d[begin:end]
        largest = np.uint32(0)
        for i in range(out.size):
            value = bf16_value(of_expert[i]) - bf16_value(of_base[i])
            out[i] = value
            largest = max(largest, np.float32(value).view(np.uint32) & _ABS)
        most[g] = largest
        worst = max(worst, largest)
    return worst


@njit(nogil=True, cache=True)
def _pack(codes, bits, out):
    """pack_row for uint8 codes in whole eights, zeros at the end; they are used up."""
    if bits == 4:
        pairs = codes.view(np.uint16)
        for i in range(out.size):
            out[i] = np.uint8((pairs[i] | (pairs[i] >> np.uint16(4))) & np.uint16(255))
    elif bits == 2:
        fours = codes.view(np.uint32)
        for i in range(out.size):
            x = fours[i] | (fours[i] >> np.uint32(6))
            out[i] = np.uint8((x | (x >> np.uint32(12))) & np.uint32(255))
    elif bits == 1:
        eights = codes.view(np.uint64)
        for i in range(out.size):
            x = eights[i] | (eights[i] >> np.uint64(7))
            x |= x >> np.uint64(14)
            out[i] = np.uint8((x | (x >> np.uint64(28))) & np.uint64(255))
    elif bits == 3:  # a constant, which the compiler unrolls
        _pack_eights(codes, 3, out)
    else:
        _pack_eights(codes, bits, out)


@njit(nogil=True, cache=True, inline="always")
def _pack_eights(codes, bits, out):
    """Eight codes are `bits` bytes: neighbours are joined, then pairs, then fours."""
    eights, apart, whole = codes.view(np.uint64), np.uint64(8 - bits), out.size // bits
    one = np.uint64(0x0001000100010001) * np.uint64((1 << bits) - 1)
    two = np.uint64(0x0000000100000001) * np.uint64((1 << (2 * bits)) - 1)
    four = np.uint64((1 << (4 * bits)) - 1)
    for i in range(eights.size):
        x = eights[i]
        x = (x & one) | ((x >> apart) & (one << np.uint64(bits)))
        x = (x & two) | ((x >> (apart + apart)) & (two << np.uint64(2 * bits)))
        eights[i] = (x & four) | ((x >> (np.uint64(4) * apart)) & (four << np.uint64(4 * bits)))
    for i in range(whole):
        for j in range(bits):
            out[bits * i + j] = codes[8 * i + j]
    for j in range(whole * bits, out.size):
        out[j] = codes[8 * whole + j - whole * bits]


@njit(nogil=True, cache=True)
def _round(d, inverse, group, bits, codes):
    """fp32 row -> uint8 codes: clip, then round as fp32 does where its last bit is worth 1 (halves to even)."""
    top = np.float32((1 << (bits - 1)) - 1)
    shift = np.float32(3 << 22) + np.float32(1 << (bits - 1))
    for g in range(inverse.size):
        begin, end = g * group, min(d.size, g * group + group)
        part, out, by = d[begin:end], codes[begin:end], inverse[g]
        for i in range(part.size):
            shifted = min(max(part[i] * by, -top), top) + shift
            out[i] = np.uint8(np.float32(shifted).view(np.uint32) & np.uint32(255))


@njit(nogil=True, cache=True)
def encode_stored(expert, base, bits, group, packed, scales):
    """encode's bytes for 3 bits and more, from uint16 bf16 [rows, in] of an expert and its base.

    True, or False at a delta that is a NaN or infinite; packed and scales are then worth nothing.
    """
    rows, columns = expert.shape
    codes, d = np.zeros((columns + 7) // 8 * 8, np.uint8), np.empty(columns, np.float32)
    most, inverse = np.empty(scales.shape[1], np.uint32), np.empty(scales.shape[1], np.float32)
    top = np.float32((1 << (bits - 1)) - 1)
    for row in range(rows):
        worst = _subtract(expert[row], base[row], group, d, most)
        if worst >= _INFINITE:
            return False
        of_row = scales[row]
        for g in range(most.size):
            of_row[g] = bf16_bits(np.uint32(most[g]).view(np.float32) / top)
            step = bf16_value(of_row[g])
            by = np.float32(1) / step if step > 0 else np.float32(0)
            inverse[g] = by if by < np.float32(np.inf) else np.float32(0)
        if bits == 8:
            _round(d, inverse, group, bits, packed[row])
        else:
            _round(d, inverse, group, bits, codes)
            _pack(codes, bits, packed[row])
    return True


@njit(nogil=True, cache=True)
def _flag_zeros(u, flags):
    """fp32 bits -> uint8 flags, 1 for +0 and -0; how many."""
    count = np.uint32(0)
    for i in range(u.size):
        zero = np.uint32(1) if u[i] & _ABS == 0 else np.uint32(0)
        flags[i] = np.uint8(zero)
        count = np.uint32(count + zero)
    return count


@njit(nogil=True, cache=True)
def _draw_all(key, first, u, draws):
    """Each 0 of a row, fp32 bits u, gets its drawn sign: draws first, first + 1, ... belong to the row."""
    fill(key, first, draws)
    for i in range(u.size):
        u[i] = draws[i] & _SIGN if u[i] & _ABS == 0 else u[i]


@njit(nogil=True, cache=True)
def _draw_few(key, first, u, flags, blocks, draws):
    """_draw_all where u, flags and draws begin and end with a block of four: only blocks with a flag are drawn."""
    fours, n = flags.view(np.uint32), 0
    for i in range(fours.size):  # every number is written, and kept by moving on: no branch to mispredict
        blocks[n] = i
        n += 1 if fours[i] else 0
    fill_blocks(key, first, blocks[: (n + 31) // 32 * 32], draws)
    for i in range(n):
        four, drawn = u[4 * blocks[i] : 4 * blocks[i] + 4], draws[4 * i : 4 * i + 4]
        for j in range(4):
            # the sign's bit for a 0, else nothing; an `if` would branch, and be mispredicted
            zero = ((four[j] & _ABS) - np.uint32(1)) & _SIGN
            four[j] = (four[j] & ~zero) | (drawn[j] & zero)


@njit(nogil=True, cache=True)
def _halve(u, codes):
    """The codes of 1 bit from fp32 bits."""
    for i in range(u.size):
        codes[i] = np.uint8((u[i] >> np.uint32(31)) ^ np.uint32(1))


@njit(nogil=True, cache=True)
def _quarter(u, inverse, group, codes):
    """The codes of 2 bits from fp32 bits: 2 or 3, and of a negative one 3 less that."""
    for g in range(inverse.size):
        begin, end = g * group, min(u.size, g * group + group)
        part, out, by = u[begin:end], codes[begin:end], inverse[g]
        for i in range(part.size):
            large = np.uint8(3) if np.uint32(part[i] & _ABS).view(np.float32) * by >= np.float32(1) else np.uint8(2)
            negative = np.int32(part[i]) >> np.int32(31)
            out[i] = large ^ np.uint8(negative & np.int32(3))


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _sums_of_halves(d):
    """(sum(d^2), sum(level * d)) of 1 bit. Each product is exact, so it may be fused with its addition."""
    energy, against = 0.0, 0.0
    for i in range(d.size):
        value = np.float64(d[i])
        energy += value * value
        against += abs(value)
    return energy, against


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _sums_of_quarters(d, inverse):
    """(sum(d^2), sum(level * d)) of 2 bits: half of all sizes, and once more the large ones."""
    energy, sizes, large = 0.0, 0.0, 0.0
    for i in range(d.size):
        size = abs(d[i])
        value = np.float64(size)
        energy += value * value
        sizes += value
        large += value if size * inverse >= np.float32(1) else 0.0
    return energy, 0.5 * sizes + large


@njit(nogil=True, cache=True)
def encode_stored_signs(expert, base, key, first_row, bits, group, packed, scales):
    """encode_stored for 1 and 2 bits; the draws are those of rows first_row ... of a matrix under `key` (uint64)."""
    rows, columns = expert.shape
    codes = np.zeros((columns + 7) // 8 * 8, np.uint8)
    # a row begins anywhere in a block of four draws: what belongs to a row stands in `whole`, which begins with the block
    whole = np.ones((columns + 6) // 4 * 4, np.float32)
    flags, draws = np.empty(whole.size, np.uint8), np.empty((whole.size // 4 + 31) // 32 * 128, np.uint32)
    blocks = np.zeros(draws.size // 4 + 1, np.uint32)
    most, inverse = np.empty(scales.shape[1], np.uint32), np.empty(scales.shape[1], np.float32)
    for row in range(rows):
        first = np.uint64(first_row + row) * np.uint64(columns)
        skip = np.int64(first & np.uint64(3))
        d = whole[skip : skip + columns]
        worst = _subtract(expert[row], base[row], group, d, most)
        if worst >= _INFINITE:
            return False
        zeros = _flag_zeros(whole.view(np.uint32), flags)
        if 16 * zeros > columns:  # from here on drawing them all costs less
            _draw_all(key, first, d.view(np.uint32), draws[:columns])
        elif zeros:
            _draw_few(key, first, whole.view(np.uint32), flags, blocks, draws)
        of_row = scales[row]
        if bits == 1:
            _halve(d.view(np.uint32), codes[:columns])
            for g in range(most.size):
                energy, against = _sums_of_halves(d[g * group : min(columns, g * group + group)])
                of_row[g] = bf16_bits(np.float32(energy / against)) if against > 0 else np.uint16(0)
        else:
            for g in range(most.size):
                by = np.float32(1.5) / np.uint32(most[g]).view(np.float32) if most[g] else np.float32(0)
                inverse[g] = by if by < np.float32(np.inf) else np.float32(0)
            _quarter(d.view(np.uint32), inverse, group, codes)
            for g in range(most.size):
                energy, against = _sums_of_quarters(d[g * group : min(columns, g * group + group)], inverse[g])
                of_row[g] = bf16_bits(np.float32(energy / against)) if against > 0 else np.uint16(0)
        _pack(codes, bits, packed[row])
    return True


@njit(nogil=True, cache=True, inline="always")
def _level(code, bits):
    """Of one code: value = level * scale."""
    if bits == 1:
        return np.float32(2) * np.float32(code) - np.float32(1)
    return np.float32(code) - (np.float32(1.5) if bits == 2 else np.float32(1 << (bits - 1)))


@njit(nogil=True, cache=True)
def decode(packed, scales, bits, group, out):
    """The inverse: uint8 [rows, bytes], uint16 [rows, groups] -> fp32 [rows, in]."""
    rows, columns = out.shape
    codes = np.empty(columns, np.uint8)
    for row in range(rows):
        unpack_row(packed[row], bits, codes)
        for g in range(scales.shape[1]):
            at = slice(g * group, min(columns, g * group + group))
            step, code, line = bf16_value(scales[row, g]), codes[at], out[row, at]
            for i in range(line.size):
                line[i] = _level(code[i], bits) * step


@njit(nogil=True, cache=True)
def synthesize(packed, scales, bits, group, base, out):
    """decode and floats.synthesize in one pass over bf16: uint16 base [rows, in] -> uint16 out, round(base + value)."""
    rows, columns = out.shape
    codes = np.empty(columns, np.uint8)
    for row in range(rows):
        unpack_row(packed[row], bits, codes)
        for g in range(scales.shape[1]):
            at = slice(g * group, min(columns, g * group + group))
            step, code, before, line = bf16_value(scales[row, g]), codes[at], base[row, at], out[row, at]
            for i in range(line.size):
                line[i] = bf16_bits(bf16_value(before[i]) + _level(code[i], bits) * step)
