"""Keeping some entries of every row: the k largest of a key, exactly, without sorting; and N of every M.

Ties go to the lower column, so the choice is a function of the keys alone.

The k largest: counting the keys that reach a number is a few instructions for 16 keys, so bisection finds a number that
at least k keys reach, but not many more; the columns of these are gathered, and bisection among their keys finds the k-th
largest. What was found for one row is tried first for the next, so that most rows are counted once.

The kernels named `_bf16` go from stored patterns to stored patterns, a row at a time in the first cache. What they
give is, to the bit, what the fp32 kernels beside them and ders_cli.codecs.base give; the tests hold it.
"""

import numpy as np

from ..counter_rng import fill
from ..jit import njit
from ..packing import count_bits, lowest_bit, unpack_bitmap
from .floats import bf16_bits, bf16_value

_ABS = np.uint32(0x7FFFFFFF)
INFINITE = np.uint32(0x7F800000)


@njit(nogil=True, cache=True)
def _count(keys, n, least):
    """How many of the first n keys reach `least`."""
    found = 0
    for i in range(n):
        found += keys[i] >= least
    return found


@njit(nogil=True, cache=True)
def _enough(keys, k, most, guess, step):
    """(low, found): found >= k of the keys reach `low`, and no more than `most` unless they tie with the k-th largest.

    The guess is tried, then the number beside it (a key that many share), then numbers further and further off, until
    two enclose the k-th: from there on by halves.
    """
    low, high, found, middle, jump = 0, 1 << 32, keys.size, guess, 1
    while found > most and high - low > 1:
        reached = _count(keys, keys.size, np.uint32(middle))
        if reached < k:
            high = middle
        else:
            low, found = middle, reached
        if high == 1 << 32 and low + jump < high:
            middle, jump, step = low + jump, step, step * 4
        elif low == 0 and high - jump > 0:
            middle, jump, step = high - jump, step, step * 4
        else:
            middle = (low + high) >> 1
    return low, found


@njit(nogil=True, cache=True)
def _kth(keys, n, k, low, found):
    """(least, reached): reached keys of the first n reach `least`: k, or more where some tie with the k-th largest.

    n is a whole number of 64 keys, the unused ones 0; `found` keys reach `low`. The search is by proportion, and by halves every other time.
    """
    high, above, halve = 1 << 32, 0, False
    while found > k and high - low > 1:
        middle = (low + high) >> 1
        if not halve:
            middle = low + max(1, (high - low) * (found - k) // (found - above))
        halve = not halve
        reached = _count(keys, n, np.uint32(middle))
        if reached < k:
            high, above = middle, reached
        else:
            low, found = middle, reached
    return low, found


@njit(nogil=True, cache=True)
def _reaching(keys, least, columns):
    """The columns of the keys that reach `least`, ascending, to the front of `columns`, which has room for 12 more.

    For a few of many: twelve columns of 64 are written, whatever there is, and kept by moving on; a branch on how many
    would be mispredicted.
    """
    found, whole = 0, keys.size - keys.size % 64
    for first in range(0, whole, 64):
        line, mask = keys[first : first + 64], np.uint64(0)
        for i in range(64):
            mask |= np.uint64(line[i] >= least) << np.uint64(i)
        end = found + count_bits(mask)
        while True:
            for i in range(12):
                columns[found + i] = first + lowest_bit(mask)
                mask &= mask - np.uint64(1)
            if mask == 0:
                break
            found += 12
        found = end
    for i in range(whole, keys.size):
        columns[found] = i
        found += keys[i] >= least


@njit(nogil=True, cache=True)
def _keep_largest(keys, k, guess, step, near, columns):
    """The columns of the k largest keys, ascending, to columns[:k]; (guess, step) to begin with for keys that are alike.

    near uint32 [in + 64], columns int32 [in + 12].
    """
    low, found = _enough(keys, k, k + k // 2 + 64, guess, step)
    if 6 * k > keys.size:
        at = 0
        for i in range(keys.size):
            columns[at] = i
            at += keys[i] >= low
    else:
        _reaching(keys, np.uint32(low), columns)
    if found == k:
        return low, step
    for i in range(found):
        near[i] = keys[columns[i]]
    near[found : found + 64] = 0
    last, reached = _kth(near, (found + 63) & ~63, k, low, found)
    kept, ties = 0, k - reached
    if ties == 0:
        for i in range(found):
            columns[kept] = columns[i]
            kept += near[i] >= last
    else:  # the higher columns of those that tie with the k-th go
        for i in range(found):
            ties += near[i] == last
        for i in range(found):
            columns[kept] = columns[i]
            equal = near[i] == last
            kept += (near[i] > last) | (equal & (ties > 0))
            ties -= equal
    spread = max(1, (last - low) // (found - k))  # from one key to the next
    return max(0, last - spread * (k // 8 + 32)), 32 * spread


@njit(nogil=True, cache=True)
def copy_row(line, out):
    """The front of line; several times as fast as numba's out[:] = line."""
    for i in range(out.size):
        out[i] = line[i]


@njit(nogil=True, cache=True)
def largest(keys, columns):
    """uint32 [rows, in] -> int32 [rows, k]: columns of each row's k largest keys, ascending."""
    near, found = np.empty(keys.shape[1] + 64, np.uint32), np.empty(keys.shape[1] + 12, np.int32)
    guess, step = 1 << 31, 1 << 29
    for row in range(keys.shape[0]):
        guess, step = _keep_largest(keys[row], columns.shape[1], guess, step, near, found)
        copy_row(found, columns[row])


@njit(nogil=True, cache=True)
def largest_drawn(key, row, width, starts, columns):
    """Rows row, row + 1, ... of a matrix of `width` columns keep starts[i + 1] - starts[i] of them, those with the largest
    draws under `key` (uint64), ascending: int32 or int64 columns, one list for all rows."""
    line, near, found = np.empty(width, np.uint32), np.empty(width + 64, np.uint32), np.empty(width + 12, np.int32)
    at, guess, step = 0, 1 << 31, 1 << 29
    for i in range(starts.size - 1):
        k = starts[i + 1] - starts[i]
        if k == 0:
            continue
        fill(key, np.uint64(row + i) * np.uint64(width), line)
        guess, step = _keep_largest(line, k, guess, step, near, found)
        copy_row(found, columns[at : at + k])
        at += k


@njit(nogil=True, cache=True)
def keep_of_blocks(keys, n, m, kept):
    """uint8 kept [in]: 1 for the n largest of every m consecutive keys."""
    for begin in range(0, keys.size, m):
        end = min(keys.size, begin + m)
        for i in range(begin, end):
            ahead = 0
            for j in range(begin, end):
                ahead += (keys[j] > keys[i]) | ((keys[j] == keys[i]) & (j < i))
            kept[i] = ahead < n


@njit(nogil=True, cache=True)
def largest_of_blocks(keys, n, m, columns):
    """uint32 [rows, in] -> int32 [rows, kept]: the n largest keys of every m consecutive (a shorter tail keeps min(n, tail)).

    The plain definition: n_of_m.keep, which conversions use, is tested against it.
    """
    kept, found = np.empty(keys.shape[1], np.uint8), np.empty(keys.shape[1] + 1, np.int32)
    for row in range(keys.shape[0]):
        keep_of_blocks(keys[row], n, m, kept)
        at = 0
        for i in range(kept.size):
            found[at] = i
            at += kept[i]
        copy_row(found, columns[row])


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


@njit(nogil=True, cache=True)
def gather(delta, columns, scale, values):
    """fp32 [rows, in], [rows, k] -> fp32 [rows, k], times scale."""
    for row in range(columns.shape[0]):
        for i in range(columns.shape[1]):
            values[row, i] = delta[row, columns[row, i]] * scale


@njit(nogil=True, cache=True, fastmath={"reassoc"})
def energy_row(line, n):
    """Sum of squares in fp64; the compiler may add in lanes."""
    total = 0.0
    for i in range(n):
        total += np.float64(line[i]) * np.float64(line[i])
    return total


@njit(nogil=True, cache=True)
def ratio(energy, held, terms):
    """fp32(energy / held), or NaN where the order in which the `terms` squares were added could decide its last bit.

    A square of an fp32 is exact in fp64; adding n of one sign is off by n 2^-53 of the sum at most, twice that
    between two orders, twice again for two sums; slack is twice that. One row in about 2^25 / n is left to a fixed order (codecs.base.gain).
    """
    if held == 0:
        return np.float32(1)
    quotient, slack = energy / held, (terms + 8) * 2.0**-50
    low, high = np.float32(quotient * (1 - slack)), np.float32(quotient * (1 + slack))
    return low if low == high else np.float32(np.nan)


@njit(nogil=True, cache=True)
def gains(delta, kept, out):
    """fp32 [rows, in], [rows, k] -> fp32 [rows]: sum(d^2) / sum(kept^2), 1 without any; NaN where it is too close to call."""
    for row in range(out.size):
        width, k = delta.shape[1], kept.shape[1]
        out[row] = ratio(energy_row(delta[row], width), energy_row(kept[row], k), width)


@njit(nogil=True, cache=True)
def delta_row(expert, base, line, keys):
    """bf16 patterns -> their fp32 difference and its magnitudes' bits; the largest of these."""
    most = np.uint32(0)
    for i in range(line.size):
        line[i] = bf16_value(expert[i]) - bf16_value(base[i])
        keys[i] = np.uint32(np.float32(line[i]).view(np.uint32) & _ABS)
        most = max(most, keys[i])
    return most


@njit(nogil=True, cache=True)
def narrow_row(line, scale, out):
    """fp32 -> bf16 patterns of line * scale."""
    for i in range(out.size):
        out[i] = bf16_bits(line[i] * scale)


@njit(nogil=True, cache=True)
def gather_bf16(expert, base, columns, scale, values):
    """bf16 patterns [rows, in] and columns [rows, k] -> bf16 values of (expert - base) * scale; whether all of the
    difference is finite."""
    held = np.empty(columns.shape[1], np.float32)
    for row in range(expert.shape[0]):
        e, b, at, most = expert[row], base[row], columns[row], np.uint32(0)
        for i in range(e.size):
            most = max(most, np.float32(bf16_value(e[i]) - bf16_value(b[i])).view(np.uint32) & _ABS)
        if most >= INFINITE:
            return False
        for i in range(at.size):
            held[i] = bf16_value(e[at[i]]) - bf16_value(b[at[i]])
        narrow_row(held, scale, values[row])
    return True


@njit(nogil=True, cache=True)
def largest_bf16(expert, base, columns, values, ratios):
    """bf16 patterns [rows, in] -> the columns of each row's k largest differences, int32 [rows, k], their bf16 values
    after the gain rule, and fp32 [rows] the gains (NaN: too close to call, see ratio); whether all is finite."""
    (rows, width), k = expert.shape, columns.shape[1]
    line, keys, guess, step = np.empty(width, np.float32), np.empty(width, np.uint32), 1 << 31, 1 << 29
    near, found, held = np.empty(width + 64, np.uint32), np.empty(width + 12, np.int32), np.empty(k, np.float32)
    for row in range(rows):
        if delta_row(expert[row], base[row], line, keys) >= INFINITE:
            return False
        guess, step = _keep_largest(keys, k, guess, step, near, found)
        for i in range(k):
            held[i] = line[found[i]]
        copy_row(found, columns[row])
        ratios[row] = scale = ratio(energy_row(line, width), energy_row(held, k), width)
        narrow_row(held, scale, values[row])
    return True


@njit(nogil=True, cache=True)
def base_row(base, out):
    """bf16 patterns -> those of base + 0: a -0 becomes +0 and a NaN quiet."""
    for i in range(out.size):
        bits = base[i]
        if bits == 0x8000:
            bits = np.uint16(0)
        if (bits & 0x7FFF) > 0x7F80:
            bits = np.uint16(bits | 0x40)
        out[i] = bits


@njit(nogil=True, cache=True)
def scatter_bf16(columns, values, base, out):
    """int32 [rows, k], bf16 [rows, k], base's bf16 patterns [rows, in] -> patterns of base + delta; column `in` is none."""
    for row in range(out.shape[0]):
        line, before, at, value = out[row], base[row], columns[row], values[row]
        base_row(before, line)
        for i in range(at.size):
            if at[i] < line.size:
                line[at[i]] = bf16_bits(bf16_value(before[at[i]]) + bf16_value(value[i]))


def magnitudes(delta: np.ndarray) -> np.ndarray:
    """fp32 -> uint32 keys that order like |d|."""
    return delta.view(np.uint32) & _ABS
