"""The operations of dispatch.py on the CPU: short products where a delta has one, else blocks of D or W and torch's own.

What is worked out from a delta (codes in a kernel's order, columns) is kept with it, by `once`. A codec's decoding has the
bits of reference.py; sums are fp32. Where D is made for a product it is rounded to x's dtype, as W would be.
"""

import torch
from torch import Tensor

from ..deltas import Delta
from . import blocks, short
from .gram import expert_gram
from .layer import moe_forward

__all__ = ["delta_matmul", "expert_gram", "moe_forward", "refuses", "synthesize"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses(op: str, x: Tensor, deltas: tuple[Delta, ...]) -> str:
    """Why this isn't run here, "" if it is: anything on the CPU in bf16, fp16 or fp32."""
    if x.device.type != "cpu":
        return f"takes tensors on the CPU, not on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"takes bf16, fp16 or fp32, not {x.dtype}"
    return ""


@torch.no_grad()
def delta_matmul(x: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    if short.pays(delta, x.dtype, x.shape[0]):
        return short.products(x, delta, [expert], [x.shape[0]])
    return blocks.whole_products(x, None, delta, [expert], [x.shape[0]])


@torch.no_grad()
def synthesize(base: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    return blocks.synthesize(base, delta, expert)
