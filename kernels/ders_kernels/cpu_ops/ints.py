"""Group-wise integers of 1 to 8 bits: encode and decode row by row.

A group is g consecutive inputs of one row (the last may be shorter); its scale s is a bf16.
  b >= 3   s = max|d| / (2^(b-1) - 1), q = round(d * fp32(1/s)) clipped to +-(2^(b-1) - 1); value (code - 2^(b-1)) s
  b = 2    levels (-1.5, -.5, .5, 1.5) s: the level is chosen with s = max|d| / 1.5, then s by the gain rule
  b = 1    levels (-1, 1) s: sign of d, s by the gain rule
Gain rule: s = sum(d^2) / sum(level * d), so that <coded, d> = <d, d> and the delta keeps its size (DRIVE,
arXiv 2105.08339). At 1 and 2 bits no level is 0: the sign of a d = 0 is drawn, since a fixed one would be a bias.
The sums are taken in fp64 of exact products; the order of addition reaches the scale's 8 bits once in some 10^13 cases.
"""

import numpy as np
from numba import njit

from ..packing import pack_row, unpack_row
from .floats import bf16_bits, bf16_value

_SIGN = np.uint32(0x80000000)


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
