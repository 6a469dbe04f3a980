"""Keeping some entries of every row: the k largest of a key, exactly, without sorting; and N of every M.

Ties go to the lower column, so the choice is a function of the keys alone.
"""

import numpy as np
from numba import njit

from ..counter_rng import fill
from ..packing import unpack_bitmap

_ABS = np.uint32(0x7FFFFFFF)


@njit(nogil=True, cache=True)
def _threshold(keys, k, counts):
    """(t, m): keep every key > t and the first m of those equal to t, k in all. Three passes of 11, 11, 10 bits."""
    prefix, left = np.uint32(0), k
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        buckets = 1 << width
        counts[:buckets] = 0
        above = shift + width
        for i in range(keys.size):
            if above == 32 or (keys[i] >> np.uint32(above)) == (prefix >> np.uint32(above)):
                counts[(keys[i] >> np.uint32(shift)) & np.uint32(buckets - 1)] += 1
        bucket = buckets - 1
        while counts[bucket] < left:
            left -= counts[bucket]
            bucket -= 1
        prefix |= np.uint32(bucket) << np.uint32(shift)
    return prefix, left


@njit(nogil=True, cache=True)
def largest(keys, columns):
    """uint32 [rows, in] -> int32 [rows, k]: columns of each row's k largest keys, ascending."""
    counts = np.empty(2048, np.int64)
    for row in range(keys.shape[0]):
        line = keys[row]
        threshold, ties = _threshold(line, columns.shape[1], counts)
        at = 0
        for i in range(line.size):
            if line[i] > threshold or (line[i] == threshold and ties > 0):
                if line[i] == threshold:
                    ties -= 1
                columns[row, at] = i
                at += 1


@njit(nogil=True, cache=True)
def largest_drawn(key, row, width, starts, columns):
    """Rows row, row + 1, ... of a matrix of `width` columns keep starts[i + 1] - starts[i] of them, those with the largest
    draws under `key` (uint64), ascending: int64 columns, one list for all rows."""
    counts, line, at = np.empty(2048, np.int64), np.empty(width, np.uint32), 0
    for i in range(starts.size - 1):
        k = starts[i + 1] - starts[i]
        if k == 0:
            continue
        fill(key, np.uint64(row + i) * np.uint64(width), line)
        threshold, ties = _threshold(line, k, counts)
        for j in range(width):
            if line[j] > threshold or (line[j] == threshold and ties > 0):
                if line[j] == threshold:
                    ties -= 1
                columns[at] = j
                at += 1


@njit(nogil=True, cache=True)
def largest_of_blocks(keys, n, m, columns):
    """uint32 [rows, in] -> int32 [rows, kept]: the n largest keys of every m consecutive (a shorter tail keeps min(n, tail))."""
    for row in range(keys.shape[0]):
        at = 0
        for begin in range(0, keys.shape[1], m):
            end = min(keys.shape[1], begin + m)
            for i in range(begin, end):
                ahead = 0
                for j in range(begin, end):
                    if keys[row, j] > keys[row, i] or (keys[row, j] == keys[row, i] and j < i):
                        ahead += 1
                if ahead < n:
                    columns[row, at] = i
                    at += 1


@njit(nogil=True, cache=True)
def columns_of_blocks(bitmap, width, n, m, columns):
    """uint8 [rows, ceil(in / 8)] -> the columns of its bits, int32 [rows, kept]; -1, or the first row that has not n of every
    m (of a shorter tail min(n, tail)), or bits past its width."""
    bad, _ = unpack_bitmap(bitmap, width, columns)
    for row in range(bitmap.shape[0] if bad < 0 else bad):
        line, wrong, begin = columns[row], False, 0
        for first in range(0, line.size, n):  # n entries belong to a block
            for i in range(first, min(first + n, line.size)):
                wrong |= (line[i] < begin) | (line[i] >= begin + m)
            begin += m
        if wrong:
            return row
    return bad


@njit(nogil=True, cache=True)
def scatter(columns, values, out):
    """int32 [rows, k], fp32 [rows, k] -> fp32 out [rows, in], zeros elsewhere; column `in` is none."""
    for row in range(out.shape[0]):
        line, at, value = out[row], columns[row], values[row]
        line[:] = np.float32(0)
        for i in range(at.size):
            if at[i] < line.size:
                line[at[i]] = value[i]


def magnitudes(delta: np.ndarray) -> np.ndarray:
    """fp32 -> uint32 keys that order like |d|."""
    return delta.view(np.uint32) & _ABS
