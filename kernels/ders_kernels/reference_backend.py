"""The definitions of reference.py as a backend: any device, any delta, slow."""

from torch import Tensor

from . import reference
from .deltas import Delta, Projection


def refuses(op: str, x: Tensor, deltas: tuple[Delta, ...]) -> str:
    """Never."""
    return ""


def delta_matmul(x: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    return reference.delta_matmul(x, delta, expert).to(x)


def synthesize(base: Tensor, delta: Delta, expert: int) -> Tensor:
    """See dispatch.py."""
    return reference.synthesize(base.cpu(), reference.decode(delta, expert)).to(base.device)


def moe_forward(
    x: Tensor,
    index: Tensor,
    gates: Tensor,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    activation: str,
) -> Tensor:
    """See dispatch.py."""
    return reference.moe_forward(x, index, gates, gate, up, down, activation).to(x)


def expert_gram(experts: Tensor) -> Tensor:
    """See dispatch.py."""
    return reference.expert_gram(experts)
