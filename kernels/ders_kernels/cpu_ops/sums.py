"""What a coded expert differs from its original by: sums over a block of rows, in fp64, row by row.

Arithmetic is fp32 for each element and fp64 across them; a row's sums do not depend on the block it came in.
"""

import numpy as np

from ..jit import njit
from .floats import bf16_value

NAMES = ("weight", "delta", "error", "kept", "cross", "coded")


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def _row_sums(w, c, b, out):
    """The six sums of one row. `reassoc` only lets the compiler add in lanes."""
    weight, delta, error, kept, cross, own = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(w.size):
        d, k, e = np.float64(w[i] - b[i]), np.float64(c[i] - b[i]), np.float64(c[i] - w[i])
        weight += np.float64(w[i]) * np.float64(w[i])
        own += np.float64(c[i]) * np.float64(c[i])
        cross += np.float64(w[i]) * np.float64(c[i])
        delta += d * d
        kept += k * d
        error += e * e
    out[0], out[1], out[2], out[3], out[4], out[5] = weight, delta, error, kept, cross, own


@njit(nogil=True, cache=True)
def differences(original, coded, base, sums, worst):
    """fp32 [rows, in] x 3 -> fp64 [rows, 6] and fp32 [rows].

    Columns: |W|^2, |D|^2, |W' - W|^2, <D', D>, <W', W>, |W'|^2 with D = W - base, D' = W' - base; worst = max|W' - W|.
    """
    for row in range(original.shape[0]):
        w, c, b = original[row], coded[row], base[row]
        _row_sums(w, c, b, sums[row])
        most = np.uint32(0)
        for i in range(w.size):
            error = np.float32(c[i] - w[i])  # its bits, sign aside, are ordered like its size; a NaN is the largest
            most = max(most, error.view(np.uint32) & np.uint32(0x7FFFFFFF))
        worst[row] = np.uint32(most).view(np.float32)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _row_sums_bf16(w, c, b, out):
    """_row_sums of uint16 bf16, and the bits of max|c - w|. Each product is exact, so it may be fused with its addition."""
    weight, delta, error, kept, cross, own = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    most = np.uint32(0)
    for i in range(w.size):
        original, coded, base = bf16_value(w[i]), bf16_value(c[i]), bf16_value(b[i])
        difference = np.float32(coded - original)
        most = max(most, difference.view(np.uint32) & np.uint32(0x7FFFFFFF))
        d, k, e = np.float64(original - base), np.float64(coded - base), np.float64(difference)
        weight += np.float64(original) * np.float64(original)
        own += np.float64(coded) * np.float64(coded)
        cross += np.float64(original) * np.float64(coded)
        delta += d * d
        kept += k * d
        error += e * e
    out[0], out[1], out[2], out[3], out[4], out[5] = weight, delta, error, kept, cross, own
    return most


@njit(nogil=True, cache=True)
def differences_bf16(original, coded, base, sums, worst):
    """`differences` from stored bits: uint16 [rows, in] x 3, in one pass."""
    for row in range(original.shape[0]):
        most = _row_sums_bf16(original[row], coded[row], base[row], sums[row])
        worst[row] = np.uint32(most).view(np.float32)
