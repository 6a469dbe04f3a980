"""8- to 1-bit codes at few tokens: torch's packed 4-bit CPU kernel on the codes, widened to 4 bits (or two times 4) at load.

The kernel computes (q - 8) * scale + zero for q in 0..15 and groups of 32, 64, 128 or 256 inputs, so

    int4, int3    (c - 2^(b-1)) s    q = c - 2^(b-1) + 8
    int2          (c - 1.5) s        q = 2c - 3 + 8                     scale s / 2, exact
    int1          (2c - 1) s         q = 2c - 1 + 8
    int8 ... 5    (c - 2^(b-1)) s    16 h + l = c - 2^(b-1) + 128       q = h with scale 16 s and zero 8 s, beside q = l with s

The last is a matrix [out, 2 in] that takes x twice. At one token it takes 0.65 of the bf16 matrix's time, as torch's 8-bit
kernel does, which has a scale for a row only (0.69 and 0.73 of 1.49 ms at [5632, 2048]). Sums are fp32. A last group that
is short is filled up with inputs of 0.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..deltas import Ints
from ..jit import njit
from ..packing import unpack_row

GROUP_SIZES = (32, 64, 128, 256)
ROWS = 16  # `out` must be a multiple


class FourBits(NamedTuple):
    """codes uint8 as the kernel wants them; scales and zeros bf16 [groups, out, 2]; whether x goes in twice."""

    codes: Tensor
    scales: Tensor
    group: int
    twice: bool


def refuses(group: int, out: int) -> str:
    """Why torch's kernel does not take such codes, "" if it does."""
    if group not in GROUP_SIZES:
        return f"torch's 4-bit kernel has groups of 32, 64, 128 or 256, not {group}"
    return f"torch's 4-bit kernel needs a multiple of {ROWS} outputs, not {out}" if out % ROWS else ""


def pack(delta: Ints, expert: int) -> FourBits:
    """One expert's codes for the kernel: half a byte for each weight, a whole one from 5 bits up."""
    (_, out, width), twice = delta.shape, delta.bits > 4
    padded = width + -width % delta.group
    wide = np.full((out, padded * (1 + twice)), 8, np.int32)
    _widen(delta.codes[expert].detach().contiguous().numpy(), delta.bits, width, wide)
    scale = delta.scale[expert].detach().to(torch.bfloat16).T
    scale, none = scale / (2 if delta.bits == 2 else 1), torch.zeros_like(scale)
    pairs = torch.stack([scale, none], 2)
    if twice:
        pairs = torch.cat([torch.stack([16 * scale, 8 * scale], 2), pairs])
    codes = torch._convert_weight_to_int4pack_for_cpu(torch.from_numpy(wide), 1)
    return FourBits(codes, pairs.contiguous(), delta.group, twice)


def product(x: Tensor, packed: FourBits) -> Tensor:
    """[T, in] bf16 -> [T, out] bf16 = x @ D.T"""
    if missing := -x.shape[1] % packed.group:
        x = torch.nn.functional.pad(x, (0, missing))
    x = torch.cat([x, x], 1) if packed.twice else x.contiguous()
    return torch._weight_int4pack_mm_for_cpu(x, packed.codes, packed.group, packed.scales)


@njit(nogil=True, cache=True)
def _widen(packed, bits, width, out):
    """uint8 codes of `bits` bits [rows, bytes] -> q int32 [rows, >= width], from 5 bits up h and then l."""
    codes = np.empty(width, np.uint8)
    factor, middle = (2, (1 << bits) - 1) if bits <= 2 else (1, 1 << (bits - 1))
    half = out.shape[1] // 2
    for row in range(packed.shape[0]):
        unpack_row(packed[row], bits, codes)
        if bits > 4:
            for column in range(width):
                wide = np.int32(codes[column]) - middle + 128
                out[row, column], out[row, half + column] = wide >> 4, wide & 15
        else:
            for column in range(width):
                out[row, column] = factor * np.int32(codes[column]) - middle + 8
