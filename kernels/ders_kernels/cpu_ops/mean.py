"""The mean of bf16 experts in one pass: summed in fp32 in expert order, times fp32(1 / E), rounded once.

Experts are read where they lie, by their addresses, a few kilobytes of each at a time, so that the fp32 sum stays in
the first cache.
"""

from collections.abc import Sequence

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from ..jit import njit
from .floats import bf16_value

_AT_ONCE = 2048


@intrinsic
def _patterns(typing_context, address):
    """A uint64 address as a pointer to uint16."""

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(types.uint64), build


@njit(nogil=True, cache=True)
def _mean(addresses, out):
    """uint64 [E] addresses of out.size bf16 each -> uint16 out; whether it holds no NaN (it is wrong where it does)."""
    share, total, most = np.float32(1 / addresses.size), np.empty(_AT_ONCE, np.float32), np.uint32(0)
    for begin in range(0, out.size, _AT_ONCE):
        end = min(out.size, begin + _AT_ONCE)
        sums, rounded = total[: end - begin], out[begin:end]
        first = carray(_patterns(addresses[0]), out.size)[begin:end]
        for i in range(sums.size):
            sums[i] = bf16_value(first[i])
        for e in range(1, addresses.size):
            expert = carray(_patterns(addresses[e]), out.size)[begin:end]
            for i in range(sums.size):
                sums[i] += bf16_value(expert[i])
        for i in range(sums.size):
            u = np.float32(sums[i] * share).view(np.uint32)
            most = max(most, u & np.uint32(0x7FFFFFFF))
            rounded[i] = np.uint16((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return most <= np.uint32(0x7F800000)


def mean(experts: Sequence[np.ndarray]) -> np.ndarray | None:
    """uint16 [E][rows, in] of bf16, one shape -> uint16 [rows, in]; None where that holds a NaN, whose bits are numpy's."""
    held = [np.ascontiguousarray(expert) for expert in experts]  # addresses do not keep an array alive
    assert all(expert.shape == held[0].shape and expert.dtype == np.uint16 for expert in held)
    out = np.empty(held[0].shape, np.uint16)
    addresses = np.array([expert.ctypes.data for expert in held], np.uint64)
    return out if _mean(addresses, out.reshape(-1)) else None
