"""N of every M entries kept, as a bitmap and values; 2:4 without a branch, for many blocks at once.

For 2:4 a row is first taken apart into four planes, plane j holding entry j of every block: then each step is the same for
neighbouring numbers, which a compiler turns into vector instructions (14 times as fast as block by block, one core of an AMD EPYC).
A last block of t < 4 entries is filled up with zeros: ties go to the lower column, so they are kept only where there is
nothing else, and are cut off again.
"""

import numpy as np

from ..jit import njit
from ..packing import pack_flags
from .floats import bf16_bits, bf16_value
from .select import INFINITE, copy_row, delta_row, energy_row, keep_of_blocks, narrow_row, ratio

_ABS = np.uint32(0x7FFFFFFF)


@njit(nogil=True, cache=True)
def _two_of_four(planes, nibbles, pairs):
    """fp32 planes [4, blocks] -> uint8 [blocks], bit j set if entry j is kept; fp32 [2, blocks] those kept, in order."""
    one, two, three, four = planes[0], planes[1], planes[2], planes[3]
    lower, higher = pairs[0], pairs[1]
    for i in range(nibbles.size):
        a, b, c, d = one[i], two[i], three[i], four[i]
        ab, ac, ad = abs(a) >= abs(b), abs(a) >= abs(c), abs(a) >= abs(d)
        bc, bd, cd = abs(b) >= abs(c), abs(b) >= abs(d), abs(c) >= abs(d)
        first = (ab & ac) | (ab & ad) | (ac & ad)  # ahead of two of the other three
        second = (bc & bd) | (bc & (not ab)) | (bd & (not ab))
        third = (cd & (not ac)) | (cd & (not bc)) | ((not ac) & (not bc))
        last = not ((first & second) | (first & third) | (second & third))
        nibbles[i] = np.uint8(first) | np.uint8(second) << 1 | np.uint8(third) << 2 | np.uint8(last) << 3
        lower[i] = a if first else b if second else c
        higher[i] = d if last else c if third else b


@njit(nogil=True, cache=True)
def _apart(line, planes):
    """line [in] -> planes [4, ceil(in / 4)], plane j holding entries j, 4 + j, ...; zeros past the end."""
    whole, tail = line.size // 4, line.size % 4
    for j in range(4):
        plane = planes[j]
        for i in range(whole):
            plane[i] = line[4 * i + j]
        if tail:
            plane[whole] = line[4 * whole + j] if j < tail else 0


@njit(nogil=True, cache=True)
def _together(planes, line):
    """The inverse of _apart."""
    whole, tail = line.size // 4, line.size % 4
    for j in range(4):
        plane = planes[j]
        for i in range(whole):
            line[4 * i + j] = plane[i]
        if j < tail:
            line[4 * whole + j] = plane[whole]


@njit(nogil=True, cache=True)
def _keep_row(line, n, m, flags, planes, nibbles, pairs, bitmap, values):
    """One row: its bitmap, and its values and maybe more after them."""
    width, blocks = line.size, nibbles.size
    if n != 2 or m != 4:
        keep_of_blocks(line.view(np.uint32) & _ABS, n, m, flags)
        pack_flags(flags, bitmap)
        at = 0
        for i in range(width):
            values[at] = line[i]
            at += flags[i]
        return
    _apart(line, planes)
    _two_of_four(planes, nibbles, pairs)
    lower, higher = pairs[0], pairs[1]
    for i in range(blocks):
        values[2 * i] = lower[i]
        values[2 * i + 1] = higher[i]
    for i in range(blocks // 2):
        bitmap[i] = nibbles[2 * i] | nibbles[2 * i + 1] << 4
    if blocks % 2:
        bitmap[blocks // 2] = nibbles[blocks - 1]
    if width % 8:
        bitmap[bitmap.size - 1] &= np.uint8((1 << (width % 8)) - 1)


@njit(nogil=True, cache=True)
def _room(width, k):
    """What a row needs: flags, planes, nibbles, pairs; values."""
    blocks = -(-width // 4)
    flags, nibbles = np.zeros(-(-width // 8) * 8, np.uint8), np.empty(blocks, np.uint8)
    planes, pairs = np.empty((4, blocks), np.float32), np.empty((2, blocks), np.float32)
    return flags, planes, nibbles, pairs, np.empty(max(k + 1, 2 * blocks), np.float32)


@njit(nogil=True, cache=True)
def keep(delta, n, m, bitmap, values):
    """fp32 [rows, in] -> uint8 [rows, ceil(in / 8)], fp32 [rows, kept]: the n largest |d| of every m consecutive."""
    flags, planes, nibbles, pairs, held = _room(delta.shape[1], values.shape[1])
    for row in range(delta.shape[0]):
        _keep_row(delta[row], n, m, flags, planes, nibbles, pairs, bitmap[row], held)
        copy_row(held, values[row])


@njit(nogil=True, cache=True)
def keep_bf16(expert, base, n, m, bitmap, values, ratios):
    """The same for the difference of bf16 patterns, with bf16 values after the gain rule, and fp32 [rows] the gains (NaN: too
    close to call, see select.ratio); whether all of the difference is finite."""
    (rows, width), k = expert.shape, values.shape[1]
    flags, planes, nibbles, pairs, held = _room(width, k)
    line, keys = np.empty(width, np.float32), np.empty(width, np.uint32)
    for row in range(rows):
        if delta_row(expert[row], base[row], line, keys) >= INFINITE:
            return False
        _keep_row(line, n, m, flags, planes, nibbles, pairs, bitmap[row], held)
        ratios[row] = scale = ratio(energy_row(line, width), energy_row(held, k), width)
        narrow_row(held, scale, values[row])
    return True


@njit(nogil=True, cache=True)
def _is_two_of_four(bitmap, width):
    """Whether a row's bits are 2 of every 4, of a shorter tail min(2, tail), and none past its width."""
    wrong = np.uint8(0)
    for i in range(width // 8):
        pairs = np.uint8(bitmap[i] - ((bitmap[i] >> 1) & 0x55))  # the count of each two bits, then of each four
        wrong |= np.uint8((pairs & 0x33) + ((pairs >> 2) & 0x33)) ^ np.uint8(0x22)
    if width % 8:
        last, left = bitmap[width // 8], width % 8
        for begin, tail in ((0, min(4, left)), (4, max(0, left - 4))):
            count = 0
            for j in range(4):
                count += (last >> (begin + j)) & 1
                wrong |= np.uint8(j >= tail and (last >> (begin + j)) & 1 > 0)
            wrong |= np.uint8(count != min(2, tail))
    return wrong == 0


@njit(nogil=True, cache=True)
def _add_two_of_four(nibbles, pairs, planes):
    """bf16 planes [4, blocks] of the base -> of base + delta, in place; a block's two bits say where its pair goes."""
    one, two, three, four = planes[0], planes[1], planes[2], planes[3]
    lower, higher, none = pairs[0], pairs[1], np.float32(0)
    for i in range(one.size):
        held, low, high = nibbles[i], bf16_value(lower[i]), bf16_value(higher[i])
        one[i] = bf16_bits(bf16_value(one[i]) + (low if held & 1 else none))
        two[i] = bf16_bits(bf16_value(two[i]) + ((high if held & 1 else low) if held & 2 else none))
        three[i] = bf16_bits(bf16_value(three[i]) + ((high if held & 3 else low) if held & 4 else none))
        four[i] = bf16_bits(bf16_value(four[i]) + (high if held & 8 else none))


@njit(nogil=True, cache=True)
def synthesize_two_of_four(bitmap, values, base, out):
    """uint8 [rows, ceil(in / 8)], bf16 [rows, kept], base's bf16 patterns [rows, in] -> patterns of base + delta.

    Stops and says False at a row that has not 2 of every 4 (of a shorter tail min(2, tail)), or bits past its width.
    """
    width, k = base.shape[1], values.shape[1]
    blocks = -(-width // 4)
    planes, pairs = np.empty((4, blocks), np.uint16), np.zeros((2, blocks), np.uint16)
    nibbles = np.empty(blocks, np.uint8)
    lower, higher = pairs[0], pairs[1]
    for row in range(base.shape[0]):
        bits, value = bitmap[row], values[row]
        if not _is_two_of_four(bits, width):
            return False
        for i in range(blocks // 2):
            nibbles[2 * i] = bits[i] & 15
            nibbles[2 * i + 1] = bits[i] >> 4
        if blocks % 2:
            nibbles[blocks - 1] = bits[blocks // 2]
        for i in range(k // 2):
            lower[i] = value[2 * i]
            higher[i] = value[2 * i + 1]
        if k % 2:
            lower[k // 2] = value[k - 1]
        _apart(base[row], planes)
        _add_two_of_four(nibbles, pairs, planes)
        _together(planes, out[row])
    return True
