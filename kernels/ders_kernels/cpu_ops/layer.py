"""A layer of experts: bases once for a token and short delta products for its pairs, or for many tokens whole experts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..deltas import Projection
from ..reference import ACTIVATIONS
from . import short
from .blocks import whole_products

BUNDLE = 512  # pairs whose activations are made in one call: more would leave the caches


class Bundle(NamedTuple):
    """Some experts, how many pairs each has (pairs.py), and of each pair the token and the place in index: int64 [pairs]."""

    experts: Sequence[int]
    counts: Sequence[int]
    tokens: Tensor
    places: Tensor


@torch.no_grad()
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
    act, gates, projections = ACTIVATIONS[activation], gates.reshape(-1, 1).float(), [p for p in (gate, up, down) if p]
    bundles = list(_bundles(index, next((p.delta.shape[0] for p in projections if p.delta), None)))
    pairs, used = sum(len(b.tokens) for b in bundles), sum(len(b.experts) for b in bundles)
    tokens = pairs / max(1, used)
    apart = {id(p): p.delta is None or short.pays(p.delta, x.dtype, tokens) for p in projections}
    bases = {id(p): x @ p.base.T.to(x.dtype) for p in (gate, up) if p and apart[id(p)]}
    out = torch.zeros(x.shape[0], down.base.shape[0])
    mixed = torch.zeros(x.shape[0], down.base.shape[1])  # sum_k g_k h_k, for the base of down
    for b in bundles:
        own = x[b.tokens]
        hidden = _product(up, own, b, bases.get(id(up)))
        hidden = act(_product(gate, own, b, bases.get(id(gate)))) * hidden if gate else act(hidden)
        if apart[id(down)]:
            mixed.index_add_(0, b.tokens, hidden * gates[b.places])
        if not apart[id(down)] or down.delta:
            y = _product(down, hidden, b, None) if not apart[id(down)] else short.products(hidden, down.delta, *b[:2])
            out.index_add_(0, b.tokens, y * gates[b.places])
    if apart[id(down)]:
        out += mixed.to(x.dtype) @ down.base.T.to(x.dtype)
    return out.to(x.dtype)


def _product(projection: Projection, x: Tensor, b: Bundle, base: Tensor | None) -> Tensor:
    """x [pairs, in] -> x_p @ W.T [pairs, out]; base: the tokens' x @ B.T, or None: whole."""
    if base is None:
        return whole_products(x, projection.base, projection.delta, b.experts, b.counts)
    y = base[b.tokens]
    return y + short.products(x, projection.delta, b.experts, b.counts) if projection.delta else y


def _bundles(index: Tensor, experts: int | None) -> Iterator[Bundle]:
    """The pairs by expert, those with a number outside 0..experts-1 left out."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    numbers, counts = flat[order].unique_consecutive(return_counts=True)
    kept: list[tuple[int, int, Tensor]] = []
    for number, count, places in zip(numbers.tolist(), counts.tolist(), order.split(counts.tolist()), strict=True):
        if number < 0 or (experts is not None and number >= experts):
            continue
        if kept and sum(c for _, c, _ in kept) + count > BUNDLE:
            yield _bundle(kept, index.shape[1])
            kept = []
        kept.append((number, count, places))
    if kept:
        yield _bundle(kept, index.shape[1])


def _bundle(kept: list[tuple[int, int, Tensor]], k: int) -> Bundle:
    experts, counts, places = zip(*kept, strict=True)
    joined = torch.cat(places)
    return Bundle(experts, counts, joined // k, joined)
