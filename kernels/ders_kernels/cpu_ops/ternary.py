"""Unbiased ternary coding: which entries of a row are kept, with what one value, so that the mean is the delta.

Importance sampling (Wangni et al., arXiv 1710.09854): entry i is kept with probability p_i = min(1, |d_i| / s) and
becomes sign(d_i) * s, so its expectation is d_i wherever |d_i| <= s. s = mean|d| / density of the row, rounded up to
bf16, so that the p_i sum to at most n = density * in. The draws are systematic (one uniform number a row, entries
kept where the running sum of p passes it plus a whole number): each p_i is met exactly and the count never passes n,
which fixes the size. Entries above s are clipped; the row's value is then raised by the gain rule (ints.py) for what
clipping takes away.
"""

import numpy as np
from numba import njit

from .floats import bf16_bits, bf16_value


@njit(nogil=True, cache=True)
def encode(delta, draws, columns, negative, scales):
    """fp32 [rows, in], uint32 [rows] -> int32 [rows, n] (in = unused), uint8 [rows, n], uint16 [rows]; clipped entries."""
    rows, width = delta.shape
    n = columns.shape[1]
    clipped = 0
    for row in range(rows):
        d = delta[row]
        total = 0.0
        for i in range(width):
            total += abs(np.float64(d[i]))
        bits = bf16_bits(np.float32(total / n))
        while np.float64(bf16_value(bits)) * n < total:
            bits = np.uint16(bits + 1)
        s = np.float64(bf16_value(bits))
        running = draws[row] * 2.0**-32
        energy, expected, at = 0.0, 0.0, 0
        for i in range(width):
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
                columns[row, at] = i
                negative[row, at] = 1 if d[i] < 0 else 0
                at += 1
        for i in range(at, n):
            columns[row, i] = width
            negative[row, i] = 0
        if expected > 0 and energy > expected * (1 + 1e-9):  # equal but for rounding where nothing was clipped
            bits = bf16_bits(np.float32(s * energy / expected))
        scales[row] = bits
    return clipped


@njit(nogil=True, cache=True)
def decode(columns, negative, scales, out):
    """The inverse, into fp32 [rows, in]."""
    out[:] = np.float32(0)
    for row in range(out.shape[0]):
        s = bf16_value(scales[row])
        for i in range(columns.shape[1]):
            if columns[row, i] < out.shape[1]:
                out[row, columns[row, i]] = -s if negative[row, i] else s
