"""int2 and int1 at few tokens: sums of inputs looked up by four bits of the codes (ders_kernels.cpu_ops.tables).

The codes, put in the kernel's order at first use, are held a second time.
"""

from collections.abc import Sequence

import torch
from ders_kernels.cpu_ops import tables
from torch import Tensor

from ..codecs.integers import IntCodec
from .forms import Form, Pieces


class Lookups(Form):
    """For bf16 inputs on the CPU, without a gradient."""

    @staticmethod
    def fits(codec: IntCodec) -> bool:
        return not tables.refuses(codec.bits, codec.group_size)

    def runs(self, projection, x: Tensor, gradient: bool) -> bool:
        return not gradient and x.device.type == "cpu" and x.dtype == torch.bfloat16

    def product(self, projection, x: Tensor, member: int, pieces: Pieces | None) -> Tensor:
        return self.products(projection, x, [member], [x.shape[0]])

    def products(self, projection, x: Tensor, members: Sequence[int], counts: Sequence[int]) -> Tensor:
        arranged = projection.made_once("all", lambda: tables.arrange(projection.packed()))
        return tables.products(x, arranged, members, counts)
