"""The operations of dispatch.py on a GPU; or on a CPU in Triton's interpreter, slowly, to check them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ..deltas import Delta, Drawn, Kept, Sum
from . import gram as gram_kernel
from . import layer, products, weights
from .config import fitting
from .kept import LONGEST, MOST_ROWS
from .pairs import OneExpert
from .settings import INTERPRETED, wide

__all__ = ["delta_matmul", "expert_gram", "moe_forward", "refuses", "synthesize"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuses(op: str, x: Tensor, deltas: tuple[Delta, ...]) -> str:
    """Why not, or ""."""
    if x.device.type == "cpu" and not INTERPRETED:
        return "x is on the cpu; Triton runs on a GPU, or, to check it, in its interpreter (TRITON_INTERPRET=1)"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; expected {', '.join(map(str, DTYPES))}"
    return next((why for delta in deltas if (why := _refuses_delta(delta, x.device))), "")


def _refuses_delta(delta: Delta, device: torch.device) -> str:
    if isinstance(delta, Sum):
        return _refuses_delta(delta.first, device) or _refuses_delta(delta.then, device)
    for part in delta.tensors():
        if part.device != device:
            return f"a part of the delta is on {part.device}, x on {device}"
        if not part.is_contiguous():
            return f"a part of the delta, {list(part.shape)}, is not contiguous"
    if isinstance(delta, Kept) and isinstance(delta.positions, Drawn) and delta.width > LONGEST:
        return f"drop with {delta.width} inputs; a program draws rows of at most {LONGEST}"
    if isinstance(delta, Kept) and isinstance(delta.positions, Drawn) and delta.shape[1] > MOST_ROWS:
        return f"drop with {delta.shape[1]} outputs; a launch takes at most {MOST_ROWS}"
    return ""


def _on_its_device(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Triton launches on the current device, which need not be the first argument's."""

    @functools.wraps(operation)
    def guarded(x: Tensor, *given: Any) -> Tensor:
        with torch.cuda.device_of(x):
            return operation(x, *given)

    return guarded


synthesize = _on_its_device(weights.synthesize)
moe_forward = _on_its_device(layer.moe_forward)


@_on_its_device
def delta_matmul(x: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    if not x.shape[0]:
        return x.new_empty(0, delta.shape[1])
    if x.shape[0] >= layer.many(delta):
        nothing = torch.full(delta.shape[1:], -0.0, dtype=x.dtype, device=x.device)
        return x @ weights.synthesize(nothing, delta, expert).T
    return products.product(products.Inputs(x, 1), delta, OneExpert(expert, x)).sum(0).to(x.dtype)


@_on_its_device
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
