"""Truncated singular value decomposition by random projection (Halko, Martinsson, Tropp, arXiv 0909.4061, 4.4).

r + 8 probes, two power iterations, each orthonormalised. Within about 1 % of the full SVD's error at a small part of
its time (docs/codecs.md). The probes come from the counter generator. BLAS sums in an order of its own, so this is
the one codec whose bytes may differ between processors. The caller keeps BLAS at one thread (engines/local.py), so
that on one machine they do not depend on the thread count.
"""

import numpy as np
from numba import njit

from ..counter_rng import draw

OVERSAMPLE, POWER_ITERATIONS = 8, 2


def factors(delta: np.ndarray, rank: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """fp32 [out, in] -> left [out, r], right [r, in], fp32, with left @ right ~ delta; singular values split evenly."""
    probes = min(rank + OVERSAMPLE, *delta.shape)
    uniform = draw(key, 0, delta.shape[1] * probes).astype(np.float64) * 2.0**-32 - 0.5
    sketch = delta @ uniform.reshape(-1, probes).astype(np.float32)
    for _ in range(POWER_ITERATIONS):
        sketch, _ = np.linalg.qr(delta.T @ np.linalg.qr(sketch)[0])
        sketch = delta @ sketch
    basis, _ = np.linalg.qr(sketch)
    u, s, vt = np.linalg.svd(basis.T @ delta, full_matrices=False)
    root = np.sqrt(s[:rank])
    return (basis @ u[:, :rank]) * root, root[:, None] * vt[:rank]


@njit(nogil=True, cache=True)
def add_products(left, right, out):
    """fp32 left [rows, r], right [r, in]: out [rows, in] += left[:, t] * right[t], t = 0, 1, ..., each rounded to fp32."""
    for row in range(out.shape[0]):
        line = out[row]
        for t in range(left.shape[1]):
            factor, other = left[row, t], right[t]
            for column in range(line.size):
                line[column] += factor * other[column]
