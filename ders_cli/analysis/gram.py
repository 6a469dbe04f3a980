"""All inner products of a group's matrices: from them cosines, norms and the distance to every base one might take.

The experts of an upcycled model differ by a part in a thousand, so the products of the matrices themselves would leave
nothing of the distances between them. Hence the rows of X are the base and the *differences* from it,

    X = [B, W_1 - B, ..., W_E - B, C_1 - B, ...]      (C: the other bases)         G = X X^T

and with W_i = B + D_i everything follows without cancellation: <W_i, W_j> = G_00 + G_0i + G_0j + G_ij,
|W_i - W_j|^2 = G_ii + G_jj - 2 G_ij. G is summed in fp64 over pieces of at most 16384 columns, each an fp32 product: by
BLAS, or, for few rows, by a kernel that is faster there (cpu_ops/moments.py).
"""

from dataclasses import dataclass

import numpy as np
from ders_kernels.cpu_ops import floats, moments

from .blocks import Block

COLUMNS = 1 << 14  # most of one fp32 product: its sums err by some 1e-6
PIECE = 1 << 18  # numbers of X that are held, for the cache; fewer columns where there are many experts
LEAST_COLUMNS = 1 << 10
FEW = 24  # rows of X


@dataclass(frozen=True)
class GramFound:
    """Of one group: norms and cosines in fp64, NaN where an expert or the base holds a number that is not finite.

    norms, delta_norms [E]: |W_i|, |W_i - B|; cosine [E, E]; to_base [E]: cosine of W_i and B;
    energy: {base: sum over experts of |W_i - base|^2}, with "" for the chosen one, "mean" for the mean as it is before it
        is rounded to the dtype, and "expert:N" for each expert.
    """

    norms: np.ndarray
    delta_norms: np.ndarray
    cosine: np.ndarray
    to_base: np.ndarray
    energy: dict[str, float]


class Gram:
    """An observer that sums G of every group."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._labels: dict[str, tuple[list[str], list[str]]] = {}
        self._held = np.empty((0, 0), np.float32)  # X of a piece

    def add(self, block: Block) -> None:
        experts, base, dtype = len(block.experts), block.base.reshape(-1), block.group.dtype
        rows = 1 + experts + len(block.others)
        deltas = [block.delta(i).reshape(-1) for i in range(experts)]
        others = [other.reshape(-1) for other in block.others.values()]
        step, total = min(COLUMNS, max(LEAST_COLUMNS, PIECE // rows)), np.zeros((rows, rows))
        if self._held.shape != (rows, step):
            self._held = np.empty((rows, step), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for begin in range(0, base.size, step):
                piece = slice(begin, min(begin + step, base.size))
                x = self._held[:, : piece.stop - begin]
                x[0] = floats.widen(base[piece], dtype)
                for row, delta in zip(x[1:], deltas, strict=False):
                    row[:] = delta[piece]
                for row, other in zip(x[1 + experts :], others, strict=True):
                    row[:] = floats.delta(other[piece], base[piece], dtype)
                _add_products(x, total)
        projection = block.group.projection
        self._sums[projection] = self._sums.get(projection, 0) + total
        self._labels[projection] = ([label for label, _ in block.group.members], list(block.others))

    def found(self, projection: str) -> GramFound:
        """Once all rows were seen."""
        g, (labels, others) = self._sums[projection], self._labels[projection]
        n = len(labels)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            with_base, d = g[0, 1 : n + 1], g[1 : n + 1, 1 : n + 1]
            inner = g[0, 0] + with_base[:, None] + with_base[None] + d
            norms = np.sqrt(np.maximum(np.diag(inner), 0))
            cosine = _cosine(inner, norms[:, None], norms[None])
            to_base = _cosine(g[0, 0] + with_base, norms, np.sqrt(g[0, 0]))
            size = np.diag(d)
            between = np.maximum(size[:, None] + size[None] - 2 * d, 0).sum(axis=0)
            energy = {"": float(size.sum()), "mean": max(float(size.sum() - d.sum() / n), 0.0)} | {
                f"expert:{label}": float(e) for label, e in zip(labels, between, strict=True)
            }
            for k, label in enumerate(others, n + 1):
                energy[label] = float(np.maximum(size + g[k, k] - 2 * g[1 : n + 1, k], 0).sum())
            return GramFound(norms, np.sqrt(size), cosine, to_base, energy)


def _add_products(x: np.ndarray, total: np.ndarray) -> None:
    """total [n, n] += x x^T, of fp32 [n, columns]."""
    if x.shape[0] > FEW:
        total += x @ x.T
        return
    below = np.zeros_like(total)
    moments.products(x, below)
    total += below + np.tril(below, -1).T


def _cosine(inner: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of two matrices of zeros it is 1: they are equal."""
    scale = a * b
    both = np.broadcast_to((a == 0) & (b == 0), inner.shape)
    return np.where(both, 1.0, np.where(scale == 0, 0.0, np.clip(inner / scale, -1, 1)))
