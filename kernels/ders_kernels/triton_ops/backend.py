"""The operations of dispatch.py on a GPU; or on a CPU in Triton's interpreter, slowly, to check them."""

import math

import torch
import triton
from torch import Tensor

from ..deltas import Delta, Drawn, Kept, Sum
from . import gram as gram_kernel
from . import products
from .config import fitting
from .kept import LONGEST
from .layer import many, moe_forward
from .pairs import OneExpert
from .settings import INTERPRETED, wide
from .weights import synthesize

__all__ = ["delta_matmul", "expert_gram", "moe_forward", "refuses", "synthesize"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses(op: str, x: Tensor, deltas: tuple[Delta, ...]) -> str:
    """Why not, or ""."""
    if x.device.type == "cpu" and not INTERPRETED:
        return "x is on the cpu; Triton runs on a GPU, or, to check it, in its interpreter (TRITON_INTERPRET=1)"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; expected {', '.join(map(str, DTYPES))}"
    return next(filter(None, map(_refuses_delta, deltas)), "")


def _refuses_delta(delta: Delta) -> str:
    if isinstance(delta, Sum):
        return _refuses_delta(delta.first) or _refuses_delta(delta.then)
    if isinstance(delta, Kept) and isinstance(delta.positions, Drawn) and delta.width > LONGEST:
        return f"drop with {delta.width} inputs; a program draws rows of at most {LONGEST}"
    return ""


def delta_matmul(x: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    if not x.shape[0]:
        return x.new_empty(0, delta.shape[1])
    if x.shape[0] >= many(delta):
        nothing = torch.full(delta.shape[1:], -0.0, dtype=x.dtype, device=x.device)
        return x @ synthesize(nothing, delta, expert).T
    return products.product(products.Inputs(x, 1), delta, OneExpert(expert, x)).sum(0).to(x.dtype)


def expert_gram(experts: Tensor) -> Tensor:
    """See dispatch.py."""
    experts = experts.contiguous()
    count, width = experts.shape
    config = fitting(gram_kernel.CONFIGS, count)
    tiles, chunks = math.ceil(count / config.tokens), triton.cdiv(width, gram_kernel.CHUNK)
    sums = torch.empty((chunks, count, count), dtype=torch.float32, device=experts.device)
    gram_kernel.gram[(chunks, tiles, tiles)](
        experts, sums, count, width, TILE=config.tokens, COLUMNS=config.columns,
        CHUNK=gram_kernel.CHUNK, WIDE=wide(experts), **config.launch(),
    )  # fmt: skip
    return sums.double().sum(0).cpu()
