"""int4 ... int1 at few tokens: torch's packed 4-bit CPU kernel on the codes, widened to 4 bits at first use.

The kernel computes (q - 8) * scale for q in 0..15 and groups of 32, 64, 128 or 256 inputs, so

    int4, int3    (c - 2^(b-1)) * s     q = c - 2^(b-1) + 8
    int2          (c - 1.5) * s         q = 2c - 3 + 8     scale s / 2, exact
    int1          (2c - 1) * s          q = 2c - 1 + 8

The packed form takes half a byte for each weight, beside the parameters. A last group that is short is filled up with
inputs of 0.
"""

import numpy as np
import torch
from ders_kernels.packing import unpack_row
from numba import njit
from torch import Tensor

from ..codecs.integers import IntCodec
from .dtypes import bits_of
from .forms import Form, Pieces

GROUP_SIZES = (32, 64, 128, 256)
ROWS = 16  # `out` must be a multiple


class Packed(Form):
    """For bf16 inputs on the CPU, without a gradient."""

    def __init__(self, codec: IntCodec):
        self.codec = codec

    @staticmethod
    def fits(codec: IntCodec, shape: tuple[int, int]) -> bool:
        """Whether torch's kernel takes such codes."""
        return codec.bits <= 4 and codec.group_size in GROUP_SIZES and shape[0] % ROWS == 0

    def runs(self, projection, x: Tensor, gradient: bool) -> bool:
        return not gradient and x.device.type == "cpu" and x.dtype == torch.bfloat16

    def product(self, projection, x: Tensor, member: int, pieces: Pieces | None) -> Tensor:
        codes, scales = projection.made_once(member, lambda: self._pack(projection, projection.piece(member)))
        if missing := -x.shape[1] % self.codec.group_size:
            x = torch.nn.functional.pad(x, (0, missing))
        x = x.contiguous()
        return torch._weight_int4pack_mm_for_cpu(x, codes, self.codec.group_size, scales)

    def _pack(self, projection, pieces: Pieces) -> tuple[Tensor, Tensor]:
        """codes uint8, as the kernel wants them; scales and zeros bf16 [groups, out, 2]."""
        out, width = projection.group.shape
        wide = np.zeros((out, width + -width % self.codec.group_size), np.int32)
        _widen(bits_of(pieces["codes"]), self.codec.bits, width, wide)
        scale = pieces["scale"].detach().to(torch.bfloat16) / (2 if self.codec.bits == 2 else 1)
        scales = torch.stack([scale.T, torch.zeros_like(scale.T)], dim=2).contiguous()
        return torch._convert_weight_to_int4pack_for_cpu(torch.from_numpy(wide), 1), scales


@njit(nogil=True, cache=True)
def _widen(packed, bits, width, out):
    """uint8 codes of `bits` bits [rows, bytes] -> q int32 [rows, >= width]."""
    codes = np.empty(width, np.uint8)
    factor, middle = (2, (1 << bits) - 1) if bits <= 2 else (1, 1 << (bits - 1))
    for row in range(packed.shape[0]):
        unpack_row(packed[row], bits, codes)
        for column in range(width):
            out[row, column] = factor * np.int32(codes[column]) - middle + 8
