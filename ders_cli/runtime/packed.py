"""int8 ... int1 at few tokens: torch's packed 4-bit CPU kernel (ders_kernels.cpu_ops.four_bits), packed at first use.

The packed form takes half a byte for each weight, a whole one from 5 bits up, beside the parameters.
"""

import torch
from ders_kernels.cpu_ops import four_bits
from torch import Tensor

from ..codecs.integers import IntCodec
from .forms import Form, Pieces


class Packed(Form):
    """For bf16 inputs on the CPU, without a gradient."""

    @staticmethod
    def fits(codec: IntCodec, shape: tuple[int, int]) -> bool:
        return not four_bits.refuses(codec.group_size, shape[0])

    def runs(self, projection, x: Tensor, gradient: bool) -> bool:
        return not gradient and x.device.type == "cpu" and x.dtype == torch.bfloat16

    def product(self, projection, x: Tensor, member: int, pieces: Pieces | None) -> Tensor:
        packed = projection.made_once(member, lambda: four_bits.pack(projection.packed(), member))
        return four_bits.product(x, packed)
