"""The definitions of reference.py as a backend: any device, any delta, slow."""

from typing import Any

from torch import Tensor

from . import reference
from .deltas import Delta


def refuses(op: str, x: Tensor, deltas: tuple[Delta, ...]) -> str:
    """Never."""
    return ""


def delta_matmul(x: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    return reference.delta_matmul(x, delta, expert).to(x)


def synthesize(base: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    return reference.synthesize(base.cpu(), reference.decode(delta, expert)).to(base.device)


def moe_forward(x: Tensor, *routed_layer: Any) -> Tensor:
    """See dispatch.py."""
    return reference.moe_forward(x, *routed_layer).to(x)


def expert_gram(experts: Tensor) -> Tensor:
    """See dispatch.py."""
    return reference.expert_gram(experts)
