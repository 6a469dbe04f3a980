"""Low rank at few tokens: x @ D.T = (x @ right.T) @ left.T for all of a layer's experts in one compiled call.

The factors of one expert are a few hundred kB, so a library's call for each of its two products costs more than they do:
0.29 ms at [5632, 2048], rank 16, one token on two cores, where this takes 0.02. Sums are fp32, and x @ right.T is not
rounded in between. Beyond a few tokens matrix units win: then two products by torch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..jit import njit
from .decode import bits_of
from .floats import bf16_bits, bf16_value
from .pairs import of_pairs


def products(x: Tensor, left: Tensor, right: Tensor, experts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """x [pairs, in], left [E, out, r], right [E, r, in], all bf16; experts and counts as in pairs.py -> x_p @ D_e.T, bf16
    [pairs, out]."""
    numbers, starts = of_pairs(experts, counts)
    out = torch.empty(x.shape[0], left.shape[1], dtype=torch.bfloat16)
    _products(bits_of(x), bits_of(left), bits_of(right), numbers, starts, bits_of(out))
    return out


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _dot(bits, values):
    """`reassoc` lets the compiler add in lanes."""
    total = np.float32(0)
    for i in range(values.size):
        total += bf16_value(bits[i]) * values[i]
    return total


@njit(nogil=True, cache=True)
def _products(x, left, right, experts, starts, out):
    inner, token = np.empty(right.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    for which in range(experts.size):
        own_left, own_right = left[experts[which]], right[experts[which]]
        for pair in range(starts[which], starts[which + 1]):
            for i in range(token.size):
                token[i] = bf16_value(x[pair, i])
            for t in range(inner.size):
                inner[t] = _dot(own_right[t], token)
            for row in range(own_left.shape[0]):
                out[pair, row] = bf16_bits(_dot(own_left[row], inner))
