"""Sums over weights that tell what experts' matrices and their deltas are like.

Moments are summed in fp64. Column sums of |W|, and inner products over PIECE columns, are fp32.
ns per weight on one core of a Zen 5 server: delta_powers 0.22, count_sizes 0.45, column_sizes 0.05; products of 5 rows 0.16, of 17 0.36,
where OpenBLAS 0.3.31 takes 1.04 and 0.56; of 65 1.2, where it takes 0.9.
"""

import numpy as np

from ..jit import njit
from .floats import bf16_value

HALVES = 16 - 3  # exponent and five bits of the mantissa: 8192 sizes, each 3 % above the one before
SIZES = 1 << HALVES
_SHIFT = np.uint32(31 - HALVES)
PIECE = 1024


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _powers(values, out):
    """Sums of the first four powers. `reassoc` only lets the compiler add in lanes."""
    one, two, three, four = 0.0, 0.0, 0.0, 0.0
    for i in range(values.size):
        v = np.float64(values[i])
        square = v * v
        one += v
        two += square
        three += square * v
        four += square * square
    out[0], out[1], out[2], out[3] = one, two, three, four


@njit(nogil=True, cache=True)
def delta_powers(delta, powers):
    """Sums of d, d^2, d^3, d^4 row by row: fp32 [rows, in] -> fp64 [rows, 4]."""
    for row in range(delta.shape[0]):
        _powers(delta[row], powers[row])


@njit(nogil=True, cache=True)
def count_sizes(delta, first, every, counts):
    """How many |d| there are of each size in the rows first, first + every, ...

    delta fp32 [rows, in]; counts uint32 [2, SIZES], added to: their sum counts |d| by its bits without the last 18. Two, since
    neighbours are often equal, and adding to what was just written waits for the write.
    """
    even, odd = counts[0], counts[1]
    for row in range(first, delta.shape[0], every):
        bits = delta[row].view(np.uint32)
        for i in range(0, bits.size - 1, 2):
            even[(bits[i] & np.uint32(0x7FFFFFFF)) >> _SHIFT] += np.uint32(1)
            odd[(bits[i + 1] & np.uint32(0x7FFFFFFF)) >> _SHIFT] += np.uint32(1)
        if bits.size & 1:
            even[(bits[bits.size - 1] & np.uint32(0x7FFFFFFF)) >> _SHIFT] += np.uint32(1)


@njit(nogil=True, cache=True)
def column_sizes(bits, total, most):
    """Add |w| to each column's total, and raise its most: uint16 [rows, in] of bf16; fp32 total, most [in]."""
    for row in range(bits.shape[0]):
        w = bits[row]
        for j in range(w.size):
            size = bf16_value(w[j] & np.uint16(0x7FFF))
            total[j] += size
            most[j] = max(most[j], size)


@njit(nogil=True, cache=True)
def column_sizes_fp32(values, total, most):
    """`column_sizes` of fp32 [rows, in]."""
    for row in range(values.shape[0]):
        w = values[row]
        for j in range(w.size):
            size = abs(w[j])
            total[j] += size
            most[j] = max(most[j], size)


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _four_products(x, a, b, c, d):
    """Inner products of x with each of four rows, in fp32: x is read once for all."""
    one, two, three, four = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(x.size):
        one += x[i] * a[i]
        two += x[i] * b[i]
        three += x[i] * c[i]
        four += x[i] * d[i]
    return one, two, three, four


@njit(nogil=True, cache=True)
def products(x, out):
    """Add the inner products of all pairs of rows: fp32 x [n, columns] -> fp64 out [n, n], below and on the diagonal."""
    last = x.shape[0] - 1
    for begin in range(0, x.shape[1], PIECE):
        end = min(begin + PIECE, x.shape[1])
        for i in range(last + 1):
            own = x[i, begin:end]
            for j in range(0, i + 1, 4):
                k, l, m = min(j + 1, last), min(j + 2, last), min(j + 3, last)
                sums = _four_products(own, x[j, begin:end], x[k, begin:end], x[l, begin:end], x[m, begin:end])
                for more in range(min(4, i + 1 - j)):
                    out[i, j + more] += np.float64(sums[more])


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _energies(d, b):
    """Sums of d^2 and of b^2."""
    energy, size = 0.0, 0.0
    for j in range(d.size):
        energy += np.float64(d[j]) * np.float64(d[j])
        size += np.float64(b[j]) * np.float64(b[j])
    return energy, size


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _fine_row(d, b, limit, share, numbers, squares):
    """One row of fine_weights; both ways are computed, as a branch that cannot be foreseen costs more."""
    number, two, four = 0.0, 0.0, 0.0
    for j in range(d.size):
        fine = 1.0 if abs(b[j]) <= limit else 0.0
        square = fine * np.float64(d[j]) * np.float64(d[j])
        number += fine
        two += square
        four += square * square
        numbers[j] += fine
        squares[j] += square * share
    return number, two, four


@njit(nogil=True, cache=True)
def fine_weights(delta, base, reach, rows, columns):
    """Sums over the weights whose base is at most `reach` times as large as the row's root mean square delta.

    fp32 delta, base [rows, in]; rows fp64 [rows, 4], written: how many these are, their sums of d^2 and d^4, and the mean of
    base^2 over the whole row; columns fp64 [2, in], added to: how many, and d^2 in units of the whole row's mean d^2. Of a row
    of zeros, and of one that is not finite, there are none.
    """
    rows[:] = 0
    for row in range(delta.shape[0]):
        energy, size = _energies(delta[row], base[row])
        mean = energy / delta.shape[1]
        rows[row, 3] = size / delta.shape[1]
        if 0 < mean < np.inf:
            limit = np.float32(reach * np.sqrt(mean))
            found = _fine_row(delta[row], base[row], limit, 1 / mean, columns[0], columns[1])
            rows[row, 0], rows[row, 1], rows[row, 2] = found
