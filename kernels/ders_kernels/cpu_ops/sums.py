"""What a coded expert differs from its original by: sums over a block of rows, in fp64, row by row.

Arithmetic is fp32 for each element and fp64 across them; a row's sums do not depend on the block it came in.
"""

import numpy as np
from numba import njit

NAMES = ("weight", "delta", "error", "kept", "cross", "coded")


@njit(nogil=True, cache=True)
def differences(original, coded, base, sums, worst):
    """fp32 [rows, in] x 3 -> fp64 [rows, 6] and fp32 [rows].

    Columns: |W|^2, |D|^2, |W' - W|^2, <D', D>, <W', W>, |W'|^2 with D = W - base, D' = W' - base; worst = max|W' - W|.
    """
    for row in range(original.shape[0]):
        weight, delta, error, kept, cross, own = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        most = np.float32(0)
        for i in range(original.shape[1]):
            w, c, b = original[row, i], coded[row, i], base[row, i]
            d, k, e = np.float64(w - b), np.float64(c - b), c - w
            weight += np.float64(w) * np.float64(w)
            own += np.float64(c) * np.float64(c)
            cross += np.float64(w) * np.float64(c)
            delta += d * d
            kept += k * d
            error += np.float64(e) * np.float64(e)
            most = max(most, abs(e))
        sums[row, 0], sums[row, 1], sums[row, 2] = weight, delta, error
        sums[row, 3], sums[row, 4], sums[row, 5] = kept, cross, own
        worst[row] = most
