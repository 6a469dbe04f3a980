"""A layer of experts: bases once for a token, deltas for each of its pairs; or, for many tokens, whole experts.

Few tokens of an expert (decode) read memory, and a base and light deltas are fewer bytes than whole experts. Many
tokens (prefill) compute, and then base and delta apart are two products in place of one, so an expert after the other
is synthesised and multiplied by the vendor's own product. (Added in the registers of one kernel, base and int4 took
longer than both.) Low rank is apart at any number.
"""

import torch
from torch import Tensor

from ..deltas import LowRank, Projection
from . import experts as steps
from .pairs import Blocks, by_expert
from .products import Inputs, product
from .weights import synthesize

MANY = 64  # mean tokens of an expert from which experts are whole
EVERY = 2**31 - 1  # "experts" where all share the base: any number is one


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
    (tokens, k), inner = index.shape, up.base.shape[0]
    deltas = [p.delta for p in (gate, up, down) if p is not None and p.delta is not None]
    experts = deltas[0].shape[0] if deltas else EVERY
    pairs = _Pairs(index.contiguous(), experts)
    whole = bool(deltas) and pairs.mean >= MANY and not all(isinstance(delta, LowRank) for delta in deltas)
    gates = gates.contiguous()

    inputs = Inputs(x, k)
    ups = pairs.products(inputs, up, whole)
    gated = pairs.products(inputs, gate, whole) if gate else None
    up_base = None if whole else _base_product(x, up)
    gate_base = None if whole or not gate else _base_product(x, gate)
    hidden = torch.empty((tokens * k, inner), dtype=x.dtype, device=x.device)
    mixed = torch.empty((tokens, inner), dtype=x.dtype, device=x.device)
    rows = steps.CONFIG.rows
    steps.activate[(tokens, -(-inner // rows))](
        _or(gate_base, x), _or(gated, x), _or(up_base, x), _or(ups, x), pairs.index, gates, hidden, mixed, inner, experts, k,
        _parts(gated), _parts(ups),
        NAME=activation, GATED=gate is not None, BASE=not whole, PAIRS=bool(deltas), ROWS=rows, **steps.CONFIG.launch(),
    )  # fmt: skip
    downs = pairs.products(Inputs(hidden, 1), down, whole)
    base = None if whole else _base_product(mixed, down)
    y = torch.empty((tokens, down.base.shape[0]), dtype=x.dtype, device=x.device)
    steps.combine[(tokens, -(-y.shape[1] // rows))](
        _or(base, x), _or(downs, x), pairs.index, gates, y, y.shape[1], experts, k, _parts(downs),
        BASE=not whole, PAIRS=downs is not None, ROWS=rows, **steps.CONFIG.launch(),
    )  # fmt: skip
    return y


def _base_product(x: Tensor, projection: Projection) -> Tensor:
    """[T, in] -> [T, out]: the vendor's own product."""
    return x @ projection.base.to(x.dtype).T


def _parts(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[0]


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """What stands in an argument that the kernel doesn't read."""
    return other if tensor is None else tensor


class _Pairs:
    """The pairs of token and expert of one call; blocks of them are made once for each size."""

    def __init__(self, index: Tensor, experts: int):
        self.index, self.experts, self.pairs = index, experts, index.numel()
        self.mean = index.numel() / max(1, min(experts, index.numel()))
        self._made: dict[int, Blocks] = {}

    def blocks(self, size: int) -> Blocks:
        if size not in self._made:
            self._made[size] = by_expert(self.index, self.experts, size)
        return self._made[size]

    def products(self, inputs: Inputs, projection: Projection, whole: bool) -> Tensor | None:
        """fp32 [parts, pairs, out]: x @ D.T, or x @ W.T if `whole`; None where D is 0."""
        if whole:
            return self._synthesized(inputs, projection)
        return None if projection.delta is None else product(inputs, projection.delta, self)

    def _synthesized(self, inputs: Inputs, projection: Projection) -> Tensor:
        """Waits for the device, to know who has tokens."""
        x, base, delta, flat = inputs.x, projection.base, projection.delta, self.index.reshape(-1)
        y = torch.empty((1, self.pairs, base.shape[0]), dtype=torch.float32, device=x.device)
        for expert in flat.unique().tolist():
            if 0 <= expert < self.experts:
                own = (flat == expert).nonzero()[:, 0]
                weight = base if delta is None else synthesize(base, delta, expert)
                y[0, own] = (x[own // inputs.divisor] @ weight.to(x.dtype).T).float()
        return y
