"""A layer of experts: bases once for a token, deltas for each of its pairs; or, for many tokens, whole experts.

Few tokens of an expert (decode) read memory, and a base and light deltas are fewer bytes than whole experts. Many
tokens (prefill) compute, and then base and delta apart are two products in place of one, so an expert after the other
is synthesised and multiplied by the vendor's own product. (Added in the registers of one kernel, base and int4 took
longer than both: 340 us at 512 tokens, [14336, 4096], of 101 and 89.) Low rank by itself is apart at any number.
"""

import torch
from torch import Tensor

from ..deltas import Delta, Ints, LowRank, Projection, Sum
from ..reference import ACTIVATIONS
from . import experts as steps
from .pairs import Blocks, by_expert
from .products import Inputs, product
from .weights import synthesize

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
    if not x.shape[0]:
        return x.new_empty(0, down.base.shape[0])
    deltas = [p.delta for p in (gate, up, down) if p is not None and p.delta is not None]
    pairs = _Pairs(index.contiguous(), deltas[0].shape[0] if deltas else EVERY)
    way = _whole if any(pairs.mean >= many(delta) for delta in deltas) else _apart
    return way(x.contiguous(), pairs, gates.contiguous(), gate, up, down, activation)


def many(delta: Delta) -> float:
    """Tokens of an expert from which its W is made ([14336, 4096] on an H100)."""
    if isinstance(delta, Sum):
        return min(many(delta.first), many(delta.then))
    if isinstance(delta, LowRank):
        return float("inf")
    return 256 if isinstance(delta, Ints) else 64


def _apart(
    x: Tensor, pairs: "_Pairs", gates: Tensor, gate: Projection | None, up: Projection, down: Projection, name: str
) -> Tensor:
    (tokens, k), inner, out, rows = pairs.index.shape, up.base.shape[0], down.base.shape[0], steps.CONFIG.rows
    inputs = Inputs(x, k)
    up_base, up_pairs = _base_product(x, up), pairs.products(inputs, up)
    gate_base, gate_pairs = (_base_product(x, gate), pairs.products(inputs, gate)) if gate else (None, None)
    hidden = torch.empty((tokens * k, inner), dtype=x.dtype, device=x.device)
    mixed = torch.empty((tokens, inner), dtype=x.dtype, device=x.device)
    steps.activate[(tokens, -(-inner // rows))](
        _or(gate_base, x), _or(gate_pairs, x), up_base, _or(up_pairs, x), pairs.index, gates, hidden, mixed,
        inner, pairs.experts, k, _parts(gate_pairs), _parts(up_pairs),
        NAME=name, GATED=gate is not None, ROWS=rows, **steps.CONFIG.launch(),
    )  # fmt: skip
    down_pairs = pairs.products(Inputs(hidden, 1), down)
    y = torch.empty((tokens, out), dtype=x.dtype, device=x.device)
    steps.combine[(tokens, -(-out // rows))](
        _base_product(mixed, down), _or(down_pairs, x), pairs.index, gates, y, out, pairs.experts, k, _parts(down_pairs),
        ROWS=rows, **steps.CONFIG.launch(),
    )  # fmt: skip
    return y


def _whole(
    x: Tensor, pairs: "_Pairs", gates: Tensor, gate: Projection | None, up: Projection, down: Projection, name: str
) -> Tensor:
    """One expert after the other, in x's dtype. Waits for the device, to know who has tokens."""
    act, y = ACTIVATIONS[name], torch.zeros((x.shape[0], down.base.shape[0]), dtype=torch.float32, device=x.device)

    def weight(projection: Projection, expert: int) -> Tensor:
        base, delta = projection.base, projection.delta
        return (base if delta is None else synthesize(base, delta, expert)).to(x.dtype).T

    for expert in pairs.index.unique().tolist():
        if 0 <= expert < pairs.experts:
            token, place = (pairs.index == expert).nonzero(as_tuple=True)
            own = x[token]
            hidden = own @ weight(up, expert)
            hidden = act(own @ weight(gate, expert)) * hidden if gate else act(hidden)
            y.index_add_(0, token, (hidden @ weight(down, expert)).float() * gates[token, place, None].float())
    return y.to(x.dtype)


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

    def products(self, inputs: Inputs, projection: Projection) -> Tensor | None:
        """fp32 [parts, pairs, out], x @ D.T; None where D is 0."""
        return None if projection.delta is None else product(inputs, projection.delta, self)
