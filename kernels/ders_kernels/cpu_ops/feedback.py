"""Integer codes chosen one input after the other, each with what the earlier ones got wrong (docs/calibration.md).

`choose` codes the columns begin ... begin + width of every row. targets [out, width] hold what each entry ought to be once
the columns before `begin` are accounted for; within the block the errors are passed on here:

    code_j = nearest level to target_j      e_j = delta_j - value(code_j)      target_k += e_j feedback[j, k], k > j

Rows do not depend on each other, and sums are in the order of the columns. Scales are given; levels as in ints.py.
"""

import numpy as np

from ..jit import njit
from ..packing import pack_row, unpack_row
from .floats import bf16_value


@njit(nogil=True, cache=True)
def unpack(packed, bits, codes):
    """uint8 [rows, bytes] -> uint8 codes [rows, in]."""
    for row in range(codes.shape[0]):
        unpack_row(packed[row], bits, codes[row])


@njit(nogil=True, cache=True)
def pack(codes, bits, packed):
    """uint8 codes [rows, in] -> uint8 [rows, bytes]."""
    for row in range(codes.shape[0]):
        pack_row(codes[row], bits, packed[row])


@njit(nogil=True, cache=True)
def thresholds(delta, scales, bits, group, inverses):
    """What ints.encode divides by, fp32 [rows, groups]: 1/scale; at 2 bits 1.5/max|d|, above which a level is a large one."""
    for row in range(delta.shape[0]):
        for g in range(scales.shape[1]):
            most = np.float32(0)
            for i in range(g * group, min(delta.shape[1], g * group + group)):
                most = max(most, abs(delta[row, i]))
            size = most / np.float32(1.5) if bits == 2 else bf16_value(scales[row, g])
            inverse = np.float32(1) / size if size > 0 else np.float32(0)
            inverses[row, g] = inverse if np.isfinite(inverse) else np.float32(0)


@njit(nogil=True, cache=True, inline="always")
def _code(target, inverse, bits, before):
    """The code of one target; where it is 0 and no level is, what it was `before`."""
    if bits >= 3:
        top = np.float32((1 << (bits - 1)) - 1)
        return np.uint8(min(max(np.rint(target * inverse), -top), top) + np.float32(1 << (bits - 1)))
    if target == 0:
        return before
    if bits == 1:
        return np.uint8(1) if target > 0 else np.uint8(0)
    large = np.uint8(1) if abs(target) * inverse >= np.float32(1) else np.uint8(0)
    return np.uint8(2) + large if target > 0 else np.uint8(1) - large


@njit(nogil=True, cache=True)
def choose(delta, scales, inverses, bits, group, feedback, begin, targets, errors, codes):
    """Code the columns that `targets` has: writes these columns of codes (uint8) and errors (fp32), uses up targets."""
    width = targets.shape[1]
    for row in range(delta.shape[0]):
        line = targets[row]
        for j in range(width):
            column = begin + j
            g = column // group
            code = _code(line[j], inverses[row, g], bits, codes[row, column])
            if bits == 1:
                level = np.float32(2) * np.float32(code) - np.float32(1)
            else:
                level = np.float32(code) - (np.float32(1.5) if bits == 2 else np.float32(1 << (bits - 1)))
            error = delta[row, column] - level * bf16_value(scales[row, g])
            codes[row, column], errors[row, column] = code, error
            later = feedback[column, begin + j + 1 : begin + width]
            rest = line[j + 1 :]
            for k in range(rest.size):
                rest[k] += error * later[k]
