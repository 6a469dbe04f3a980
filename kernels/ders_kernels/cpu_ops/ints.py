"""Group-wise integers of 1 to 8 bits: encode and decode row by row.

A group is g consecutive inputs of one row (the last may be shorter); its scale s is a bf16.
  b >= 3   s = max|d| / (2^(b-1) - 1), q = round(d / s) clipped to +-(2^(b-1) - 1); value (code - 2^(b-1)) s
  b = 2    levels (-1.5, -.5, .5, 1.5) s: the level is chosen with s = max|d| / 1.5, then s by the gain rule
  b = 1    levels (-1, 1) s: sign of d, s by the gain rule
Gain rule: s = sum(d^2) / sum(level * d), so that <coded, d> = <d, d> and the delta keeps its size (DRIVE,
arXiv 2105.08339). At 1 and 2 bits no level is 0: the sign of a d = 0 is drawn, since a fixed one would be a bias.
The sums are taken in fp64: their products are exact, so the order of addition does not reach the rounded scale.
"""

import numpy as np
from numba import njit

from ..packing import pack_row, unpack_row
from .floats import bf16_bits, bf16_value

_SIGN = np.uint32(0x80000000)


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
            energy, against = 0.0, 0.0
            for i in range(begin, end):
                positive = d[i] > 0 or (d[i] == 0 and draws[row, i] < _SIGN)
                if bits == 1:
                    code, level = (1, 1.0) if positive else (0, -1.0)
                else:
                    large = abs(d[i]) * inverse >= np.float32(1)
                    code = (3 if large else 2) if positive else (0 if large else 1)
                    level = code - 1.5
                codes[i] = np.uint8(code)
                energy += np.float64(d[i]) * np.float64(d[i])
                against += level * np.float64(d[i])
            scales[row, g] = bf16_bits(np.float32(energy / against)) if against > 0 else np.uint16(0)
        pack_row(codes, bits, packed[row])


@njit(nogil=True, cache=True)
def decode(packed, scales, bits, group, out):
    """The inverse: uint8 [rows, bytes], uint16 [rows, groups] -> fp32 [rows, in]."""
    rows, columns = out.shape
    codes = np.empty(columns, np.uint8)
    zero = np.float32(1) if bits == 1 else (np.float32(1.5) if bits == 2 else np.float32(1 << (bits - 1)))
    unit = np.float32(2) if bits == 1 else np.float32(1)
    for row in range(rows):
        unpack_row(packed[row], bits, codes)
        for g in range(scales.shape[1]):
            step = bf16_value(scales[row, g])
            for i in range(g * group, min(columns, g * group + group)):
                out[row, i] = (unit * np.float32(codes[i]) - zero) * step
