"""Truncated singular value decomposition by random projection (Halko, Martinsson, Tropp, arXiv 0909.4061, 4.4).

r + 8 probes, two power iterations, each orthonormalised. Within about 1 % of the full SVD's error at a small part of
its time (docs/codecs.md). The probes come from the counter generator. BLAS sums in an order of its own, so this is
the one codec whose bytes may differ between processors. The caller keeps BLAS at one thread (engines/local.py), so
that on one machine they do not depend on the thread count.
"""

import numpy as np

from ..counter_rng import draw
from ..jit import njit

OVERSAMPLE, POWER_ITERATIONS = 8, 2
TILE_ROWS, TILE_COLUMNS = 16, 1024


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
    """fp32 left [rows, r], right [r, in]: out [rows, in] += left[:, t] * right[t], t = 0, 1, ..., each rounded to fp32.

    Four t at a time, so that a sum stays in a register for these; by tiles, so that `right` comes from a cache.
    """
    rank, whole = left.shape[1], left.shape[1] // 4 * 4
    for begin in range(0, out.shape[0], TILE_ROWS):
        for first in range(0, out.shape[1], TILE_COLUMNS):
            end = first + TILE_COLUMNS
            for row in range(begin, min(begin + TILE_ROWS, out.shape[0])):
                line, factors = out[row, first:end], left[row]
                for t in range(0, whole, 4):
                    a, b, c, d = (
                        right[t, first:end],
                        right[t + 1, first:end],
                        right[t + 2, first:end],
                        right[t + 3, first:end],
                    )
                    e, f, g, h = factors[t], factors[t + 1], factors[t + 2], factors[t + 3]
                    for i in range(line.size):
                        line[i] = line[i] + e * a[i] + f * b[i] + g * c[i] + h * d[i]
                for t in range(whole, rank):
                    factor, a = factors[t], right[t, first:end]
                    for i in range(line.size):
                        line[i] += factor * a[i]
