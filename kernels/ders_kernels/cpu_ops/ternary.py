"""Unbiased ternary coding: which entries of a row are kept, with what one value, so that the mean is the delta.

Importance sampling (Wangni et al., arXiv 1710.09854): entry i is kept with probability p_i = min(1, |d_i| / s) and
becomes sign(d_i) * s, so its expectation is d_i wherever |d_i| <= s. s = mean|d| / density of the row, rounded up to
bf16, so that the p_i sum to at most n = density * in. The draws are systematic (one uniform number a row, entries
kept where the running sum of p passes it plus a whole number): each p_i is met exactly and the count never passes n,
which fixes the size. Entries above s are clipped; the row's value is then raised by the gain rule (ints.py) for what
clipping takes away.

The definition adds one entry after another, in fp64 (`encode_row`). `_encode_row_by_eights` adds eight at a time and looks
into those eights alone that pass a whole number; a row in which the order of the sums could matter it leaves to the former.
"""

import numpy as np

from ..jit import njit
from .floats import bf16_bits, bf16_value
from .select import INFINITE, base_row, delta_row


@njit(nogil=True, cache=True)
def encode_row(d, u, columns, negative):
    """fp32 [in], u in [0, 1) -> int32 [n] (in = unused), uint8 [n]; returns the bits of the row's value, clipped entries."""
    n, total, clipped = columns.size, 0.0, 0
    for i in range(d.size):
        total += abs(np.float64(d[i]))
    bits = _scale(total, n)
    s = np.float64(bf16_value(bits))
    running = u
    energy, expected, at = 0.0, 0.0, 0
    for i in range(d.size):
        size = abs(np.float64(d[i]))
        if size == 0:
            continue
        p = min(1.0, size / s)
        if size > s:
            clipped += 1
        energy += size * size
        expected += p * s * size
        before = np.floor(running)
        running += p
        if np.floor(running) > before and at < n:
            columns[at] = i
            negative[at] = 1 if d[i] < 0 else 0
            at += 1
    for i in range(at, n):
        columns[i] = d.size
        negative[i] = 0
    if expected > 0 and energy > expected * (1 + 1e-9):  # equal but for rounding where nothing was clipped
        bits = bf16_bits(np.float32(s * energy / expected))
    return bits, clipped


@njit(nogil=True, cache=True)
def _scale(total, n):
    """Bits of the least bf16 s with s * n >= total."""
    bits = bf16_bits(np.float32(total / n))
    while np.float64(bf16_value(bits)) * n < total:
        bits = np.uint16(bits + 1)
    return bits


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _sums_of_eights(d, most, sums):
    """fp32 [in] -> fp64 [ceil(in / 8)]: sums of min(|d|, most) of eight entries each; and the sum of all."""
    total, whole = 0.0, d.size // 8
    for i in range(whole):
        part = min(abs(np.float64(d[8 * i])), most) + min(abs(np.float64(d[8 * i + 1])), most)
        part += min(abs(np.float64(d[8 * i + 2])), most) + min(abs(np.float64(d[8 * i + 3])), most)
        part += min(abs(np.float64(d[8 * i + 4])), most) + min(abs(np.float64(d[8 * i + 5])), most)
        part += min(abs(np.float64(d[8 * i + 6])), most) + min(abs(np.float64(d[8 * i + 7])), most)
        sums[i] = part
        total += part
    if whole < sums.size:
        part = 0.0
        for i in range(8 * whole, d.size):
            part += min(abs(np.float64(d[i])), most)
        sums[whole] = part
        total += part
    return total


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _clipped_energies(d, s):
    """Sums of |d|^2 and of min(|d|, s) |d|, and how many |d| are above s."""
    energy, expected, clipped = 0.0, 0.0, 0
    for i in range(d.size):
        size = abs(np.float64(d[i]))
        energy += size * size
        expected += min(size, s) * size
        clipped += size > s
    return energy, expected, clipped


@njit(nogil=True, cache=True)
def _encode_row_by_eights(d, largest, u, sums, columns, negative):
    """(settled, bits, clipped): what encode_row gives, unless a number comes so near to one that decides something that the
    order of the additions could count (about one row in a million). largest = max|d|; sums fp64 [ceil(in / 8)].

    A sum of m terms of one sign is off by m 2^-53 of it at most; `slack` is eight times that.
    """
    n, slack = columns.size, (d.size + 8) * 2.0**-50
    total = _sums_of_eights(d, np.inf, sums)
    bits = _scale(total * (1 + slack), n)
    s, clipped = np.float64(bf16_value(bits)), 0
    if bits != _scale(total * (1 - slack), n) or bits >= 0x7F80:
        return False, bits, clipped
    if largest > s:
        energy, expected, clipped = _clipped_energies(d, s)
        _sums_of_eights(d, s, sums)
        excess = energy / expected - (1 + 1e-9)
        if abs(excess) < 1e-9 * 2.0**-4 + 4 * slack:
            return False, bits, clipped
        if excess > 0:
            raised = s * energy / expected
            bits = bf16_bits(np.float32(raised * (1 - 2 * slack)))
            if bits != bf16_bits(np.float32(raised * (1 + 2 * slack))):
                return False, bits, clipped
    near, at, before = s * (n + 1) * slack, 0, 0.0
    target = (1 - u) * s  # running passes 1 where the sum of sizes passes this; 2, one s later
    reached = np.empty(9)
    for eight in range(sums.size if total > 0 else 0):
        first, after = 8 * eight, before + sums[eight]
        if after >= target:
            reached[0] = before
            for j in range(8):
                size = abs(np.float64(d[first + j])) if first + j < d.size else 0.0
                reached[j + 1] = reached[j] + min(size, s)
            while reached[8] >= target:
                j = 0
                for other in range(1, 8):  # how many fall short: no branch to mispredict
                    j += reached[other] < target
                if at == n or target - reached[j] < near or reached[j + 1] - target < near:
                    return False, bits, clipped
                columns[at] = first + j
                negative[at] = d[first + j] < 0
                at += 1
                target = (at + 1 - u) * s
        before = after
    if total > 0 and target - before < near:
        return False, bits, clipped
    for i in range(at, n):
        columns[i] = d.size
        negative[i] = 0
    return True, bits, clipped


@njit(nogil=True, cache=True)
def _encode(d, largest, draw, sums, columns, negative):
    """(bits, clipped) of one row, the fast way where it is certain."""
    u = draw * 2.0**-32
    settled, bits, clipped = _encode_row_by_eights(d, largest, u, sums, columns, negative)
    if not settled:
        bits, clipped = encode_row(d, u, columns, negative)
    return bits, clipped


@njit(nogil=True, cache=True)
def encode(delta, draws, columns, negative, scales):
    """fp32 [rows, in], uint32 [rows] -> int32 [rows, n] (in = unused), uint8 [rows, n], uint16 [rows]; clipped entries."""
    clipped, sums = 0, np.empty(-(-delta.shape[1] // 8))
    for row in range(delta.shape[0]):
        d, largest = delta[row], np.float32(0)
        for i in range(d.size):
            largest = max(largest, abs(d[i]))
        scales[row], more = _encode(d, largest, draws[row], sums, columns[row], negative[row])
        clipped += more
    return clipped


@njit(nogil=True, cache=True)
def encode_bf16(expert, base, draws, columns, negative, scales):
    """encode for the difference of bf16 patterns [rows, in]; whether all of it is finite."""
    width = expert.shape[1]
    line, keys, sums = np.empty(width, np.float32), np.empty(width, np.uint32), np.empty(-(-width // 8))
    for row in range(expert.shape[0]):
        most = delta_row(expert[row], base[row], line, keys)
        if most >= INFINITE:
            return False
        largest = np.uint32(most).view(np.float32)
        scales[row], _ = _encode(line, largest, draws[row], sums, columns[row], negative[row])
    return True


@njit(nogil=True, cache=True)
def decode(columns, negative, scales, out):
    """The inverse, into fp32 [rows, in]."""
    out[:] = np.float32(0)
    for row in range(out.shape[0]):
        s = bf16_value(scales[row])
        for i in range(columns.shape[1]):
            if columns[row, i] < out.shape[1]:
                out[row, columns[row, i]] = -s if negative[row, i] else s


@njit(nogil=True, cache=True)
def decode_bf16(columns, negative, scales, base, out):
    """The inverse, onto the base's bf16 patterns [rows, in]; negative is uint8 [rows, ceil(n / 8)], a bit for each."""
    for row in range(out.shape[0]):
        line, before, at, signs, s = out[row], base[row], columns[row], negative[row], bf16_value(scales[row])
        base_row(before, line)
        for i in range(at.size):
            if at[i] < line.size:
                value = -s if (signs[i >> 3] >> (i & 7)) & 1 else s
                line[at[i]] = bf16_bits(bf16_value(before[at[i]]) + value)
