"""One call for each operation, whatever runs it: `triton` on a GPU, `cpu` compiled kernels, `reference` plain torch.

    delta_matmul(x, delta, expert)                             x @ D.T, without making D where there is a way
    synthesize(base, delta, expert)                            round(B + D), the bits of `ders restore`
    moe_forward(x, index, gates, gate, up, down, activation)   a layer: routed tokens, bases once a token, deltas apart
    expert_gram(experts)                                       inner products of every two experts

A backend that is asked for by name does the work or raises Refused with the reason. `auto` takes the first of triton,
cpu and reference that doesn't refuse, and says once, on this module's logger, which it took for what and why.
"""

import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

from .deltas import Delta, Projection
from .reference import ACTIVATIONS

BACKENDS = {
    "triton": "ders_kernels.triton_ops.backend",
    "cpu": "ders_kernels.cpu_ops.backend",
    "reference": "ders_kernels.reference_backend",
}
OLDEST_TRITON = (3, 6)
_log = logging.getLogger(__name__)
_said: set[tuple[str, ...]] = set()


class Refused(Exception):
    """A backend can't run this; the text says why and what can."""


def delta_matmul(x: Tensor, delta: Delta, expert: int, backend: str = "auto") -> Tensor:
    """[T, in] bf16 | fp16 | fp32 -> [T, out] in x's dtype: x @ D_expert.T. Sums are fp32."""
    _check_expert(delta, expert)
    _check("x", x, (x.shape[0], delta.shape[2]))
    return choose("delta_matmul", backend, x, delta).delta_matmul(x, delta, expert)


def synthesize(base: Tensor, delta: Delta, expert: int, backend: str = "auto") -> Tensor:
    """base [out, in] -> W = round(fp32(B) + D_expert) of the same dtype: the same bits from any backend."""
    _check_expert(delta, expert)
    _check("base", base, delta.shape[1:])
    return choose("synthesize", backend, base, delta).synthesize(base, delta, expert)


def moe_forward(
    x: Tensor,
    index: Tensor,
    gates: Tensor,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    backend: str = "auto",
) -> Tensor:
    """x [T, hidden], index int64 [T, k], gates [T, k] -> [T, hidden] in x's dtype; reference.moe_forward says what."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected {', '.join(ACTIVATIONS)}")
    inner, hidden = up.base.shape
    for name, projection, shape in (
        ("gate", gate, (inner, hidden)),
        ("up", up, (inner, hidden)),
        ("down", down, (hidden, inner)),
    ):
        if projection is not None:
            _check(f"{name}'s base", projection.base, shape)
            if projection.delta is not None and projection.delta.shape[1:] != shape:
                raise ValueError(f"{name}'s delta: expected {list(shape)}, found {list(projection.delta.shape[1:])}")
    _check("x", x, (x.shape[0], hidden))
    _check("gates", gates, tuple(index.shape))
    projections = [p for p in (gate, up, down) if p is not None]
    deltas = [p.delta for p in projections if p.delta is not None]
    if (
        torch.is_grad_enabled()
        and any(p.base.requires_grad for p in projections)
        and backend not in ("auto", "reference")
    ):
        raise Refused(f"moe_forward: backend {backend}: a base needs a gradient, and kernels have none")
    return choose("moe_forward", backend, x, *deltas).moe_forward(x, index, gates, gate, up, down, activation)


def expert_gram(experts: Tensor, backend: str = "auto") -> Tensor:
    """[E, n] floats -> fp64 [E, E] on the CPU."""
    return choose("expert_gram", backend, experts).expert_gram(experts)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {list(shape)}, found {list(tensor.shape)}")


def _check_expert(delta: Delta, expert: int) -> None:
    if not 0 <= expert < delta.shape[0]:
        raise IndexError(f"expert {expert}: expected 0 ... {delta.shape[0] - 1}")


def choose(op: str, asked: str, x: Tensor, *deltas: Delta) -> ModuleType:
    """The backend that runs `op` on these. Raises Refused with the reasons."""
    if asked != "auto":
        if asked not in BACKENDS:
            raise Refused(f"backend {asked!r}: expected auto, {', '.join(BACKENDS)}")
        if why := _refusal(asked, op, x, deltas):
            raise Refused(f"{op}: backend {asked}: {why}")
        return importlib.import_module(BACKENDS[asked])
    passed = []
    for name in BACKENDS:
        interpreter = name == "triton" and x.device.type == "cpu"  # for checks alone, so only if it is named
        if not (why := "x is on the cpu" if interpreter else _refusal(name, op, x, deltas)):
            _say(op, name, x.device.type, passed)
            return importlib.import_module(BACKENDS[name])
        passed.append(f"{name}: {why}")
    raise Refused(f"{op}: no backend runs this; {'; '.join(passed)}")


def _refusal(name: str, op: str, x: Tensor, deltas: tuple[Delta, ...]) -> str:
    """Why a backend can't run this, "" if it can."""
    if name != "reference" and torch.is_grad_enabled():
        if any(t.requires_grad for t in (x, *(part for delta in deltas for part in delta.tensors()))):
            return "something needs a gradient, and kernels have none"
    if name == "triton":
        try:
            import triton
        except ImportError:
            return "needs triton, which there is for Linux; pip install 'ders-cli[gpu]'"
        if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
            return f"needs triton {'.'.join(map(str, OLDEST_TRITON))} or later, found {triton.__version__}"
    return importlib.import_module(BACKENDS[name]).refuses(op, x, deltas)


def _say(op: str, name: str, device: str, passed: list[str]) -> None:
    if (op, name, device, *passed) not in _said:
        _said.add((op, name, device, *passed))
        _log.info("%s on %s: %s%s", op, device, name, f" ({'; '.join(passed)})" if passed else "")
