"""What a coded expert differs from its original by: sums over a block of rows, in fp64, row by row.

Arithmetic is fp32 for each element and fp64 across them; a row's sums do not depend on the block it came in.
"""

import numpy as np
from numba import njit

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
