"""The experts of one layer: y = sum over a token's experts k of g_k FFN_k(x), on DeRS projections.

*Apart*: since gate and up read the same x for all experts, and down is linear, with SwiGLU

    h_k = act(x Bg' + x Dg_k') * (x Bu' + x Du_k')        y = (sum_k g_k h_k) Bd' + sum_k g_k (h_k Dd_k')

so the products with the bases are made once for a token, whatever the number of its experts. *Whole*: x W_k' with
synthesised weights, as a stock expert does. Each projection goes the way that is faster (choice.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from . import gpu
from .group import MixedGroup, RuntimeGroup
from .mixed import MixedProjection
from .projection import WEIGHTS, DersProjection

Activate = Callable[[Tensor | None, Tensor], Tensor]
Biases = Callable[[str, int], Tensor | None]
AnyProjection = DersProjection | MixedProjection


# Most pairs of token and expert whose activations and sums are made in one call, so that all threads have work; more
# would not stay in the CPU's caches. Whole, 8 experts on two cores, ms a layer, one expert a call | 512 | 4096:
# 64 tokens top-2 36.7 | 32.9 | 32.4; 256 tokens top-8 185 | 180 | 200.
BUNDLE_PAIRS = 512


class _Routed(NamedTuple):
    """The tokens of one expert."""

    expert: int
    tokens: Tensor | None  # int64 [t]; None: all of them, in order
    gates: Tensor  # [t, 1] fp32


class _Bundle(NamedTuple):
    """Some experts, and their pairs of token and expert, one expert's after the other's."""

    experts: list[int]
    counts: list[int]  # pairs of each
    tokens: Tensor | None  # int64 [pairs]; None: all tokens, in order
    gates: Tensor  # [pairs, 1] fp32


class DersExperts(nn.Module):
    """Stands in for transformers' *Experts modules.

    activate(gate [t, inner] or None, up [t, inner]) -> [t, inner]; biases(projection, expert) -> [out] or None, asked
    for at each call. `way` is "auto", or "apart" or "whole" for all. `gate_proj`, `up_proj`, `down_proj` are
    DersProjections (of a group of several codecs a MixedProjection), or those of `slice0`, `slice1`, ... where the FFN was
    cut into slices with a base each.
    """

    def __init__(
        self,
        groups: Sequence[RuntimeGroup | MixedGroup],
        activate: Activate,
        biases: Biases | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.activate, self.biases, self.way = activate, biases, "auto"
        self._slices = tuple(dict.fromkeys(group.slice for group in groups))
        for name in self._slices:
            owner = self
            if name:
                owner = nn.Module()
                self.add_module(name, owner)
            owner.add_module("gate_proj", None)  # an FFN may have no gate
            for group in groups:
                if group.slice == name:
                    made = MixedProjection if isinstance(group, MixedGroup) else DersProjection
                    owner.add_module(f"{group.projection}_proj", made(group, device, dtype))
            _check(owner, groups[0].module, name)

    @property
    def cache_bytes(self) -> int:
        """Most that the synthesised weights may take which are kept for the next call: of all layers together."""
        return WEIGHTS.limit

    @cache_bytes.setter
    def cache_bytes(self, limit: int) -> None:
        WEIGHTS.limit = limit

    # The loop over experts depends on the data, and decoding is no torch code: a graph breaks here anyway.
    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden], int64 [T, k], [T, k] -> [T, hidden] of the same dtype; sums are fp32.

        An expert number that no group has (transformers' mark for "not on this rank") adds nothing.
        """
        if gpu.runs(self, hidden_states):
            return gpu.forward(self, hidden_states, top_k_index, top_k_weights)
        routed = _by_expert(top_k_index, top_k_weights)
        out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for name in self._slices:
            owner = self.get_submodule(name)
            own = [r for r in routed if r.expert in owner.up_proj.member_of]
            if not own:
                continue
            if name and (used := _used(own, hidden_states.shape[0])) is not None:
                some = self._run(owner, hidden_states[used], _renumber(own, used, hidden_states.shape[0]))
                out = out.index_add(0, used, some)
            else:
                out = out + self._run(owner, hidden_states, own)
        return out.to(hidden_states.dtype)

    def _run(self, owner: nn.Module, x: Tensor, routed: list[_Routed]) -> Tensor:
        """x [T, hidden], the experts of one slice -> [T, hidden] fp32."""
        bundles, active = _bundles(routed, x), len(routed)
        xs = list(_taken(x, bundles))
        ups = self._products(owner.up_proj, x, xs, bundles, active)
        gates = self._products(owner.gate_proj, x, xs, bundles, active) if owner.gate_proj else repeat(None)
        down, out = owner.down_proj, torch.zeros(x.shape[0], owner.down_proj.group.shape[0], device=x.device)
        apart = self._apart(down, x, _pairs(bundles), active)
        mixed = torch.zeros(x.shape[0], down.group.shape[1], device=x.device) if apart else None  # sum_k g_k h_k
        pieces = _pieces(down, x)
        for bundle, gate, up in zip(bundles, gates, ups, strict=False):
            hidden = self.activate(gate, up)
            if apart:
                _add(mixed, hidden * bundle.gates, bundle.tokens)
            if not apart or not down.no_delta or self.biases:
                y = self._of_pairs(down, hidden, None, bundle, apart, pieces)
                _add(out, y * bundle.gates, bundle.tokens)
        return out + down.base_product(mixed.to(x.dtype)) if apart else out

    def _products(
        self, projection: AnyProjection, x: Tensor, xs: list[Tensor], bundles: list[_Bundle], active: int
    ) -> Iterator[Tensor]:
        """[pairs, out] for one bundle after the other: x @ W.T and bias."""
        pieces, apart = _pieces(projection, x), self._apart(projection, x, _pairs(bundles), active)
        of_base = _taken(projection.base_product(x), bundles) if apart else repeat(None)
        for bundle, own, base in zip(bundles, xs, of_base, strict=False):
            yield self._of_pairs(projection, own, base, bundle, apart, pieces)

    def _of_pairs(
        self,
        projection: AnyProjection,
        x: Tensor,
        base: Tensor | None,
        bundle: _Bundle,
        apart: bool,
        pieces: list[dict[str, Tensor]] | None,
    ) -> Tensor:
        """x [pairs, in] -> [pairs, out]: x @ W.T, or if `apart` x @ D.T and what is given as base; and bias."""
        members = [projection.member_of[expert] for expert in bundle.experts]
        if not apart:
            y = projection.whole_products(x, members, bundle.counts, pieces)
        elif projection.no_delta and base is not None:
            y = base
        else:
            y = projection.delta_products(x, members, bundle.counts, pieces)
            y = y if base is None else base + y
        if not self.biases:
            return y
        biases = [self.biases(projection.group.projection, expert) for expert in bundle.experts]
        if biases[0] is None:
            return y
        return y + torch.cat([b.expand(n, -1) for b, n in zip(biases, bundle.counts, strict=True)])

    def _apart(self, projection: AnyProjection, x: Tensor, pairs: int, active: int) -> bool:
        """Pairs of token and expert, and how many experts have any."""
        if self.way != "auto" or projection.no_delta:
            return self.way != "whole"
        return projection.apart(x, pairs / max(1, active), active)


def _check(owner: nn.Module, module: str, name: str) -> None:
    """Raise UnsupportedError unless up and down (and gate) are there for the same experts."""
    made = {p: m for p in ("gate", "up", "down") if (m := getattr(owner, f"{p}_proj", None)) is not None}
    where = f"{module}.{name}" if name else module
    if missing := {"up", "down"} - made.keys():
        raise UnsupportedError(f"{where}: expected groups for up and down, {sorted(missing)[0]} is missing")
    if len({m.group.experts for m in made.values()}) != 1:
        raise UnsupportedError(f"{where}: its projections are of different experts")


def _by_expert(index: Tensor, weights: Tensor) -> list[_Routed]:
    """[T, k] each -> the experts that have tokens, ascending, each with its tokens in order."""
    k, tokens = index.shape[1], index.shape[0]
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    rows, gates = order // k, weights.reshape(-1)[order].float()[:, None]
    experts, counts = torch.unique_consecutive(flat[order], return_counts=True)
    counts = counts.tolist()
    each = zip(experts.tolist(), counts, rows.split(counts), gates.split(counts), strict=True)
    return [_Routed(expert, None if _all(own, count, tokens) else own, g) for expert, count, own, g in each]


def _all(rows: Tensor, count: int, tokens: int) -> bool:
    """Whether ascending rows are 0..tokens-1. A router that names an expert twice for a token may only look so."""
    return count == tokens and (count == 1 or bool((rows.diff() == 1).all()))


def _used(routed: list[_Routed], tokens: int) -> Tensor | None:
    """The tokens that any of these experts has, None for all of them."""
    if any(r.tokens is None for r in routed):
        return None
    used = torch.cat([r.tokens for r in routed]).unique()
    return None if used.numel() == tokens else used


def _renumber(routed: list[_Routed], used: Tensor, tokens: int) -> list[_Routed]:
    """The same with numbers that count in `used`."""
    number = torch.zeros(tokens, dtype=torch.int64, device=used.device)
    number[used] = torch.arange(used.numel(), device=used.device)
    return [r._replace(tokens=number[r.tokens]) for r in routed]


def _bundles(routed: list[_Routed], x: Tensor) -> list[_Bundle]:
    """Experts that go through activation and sums together."""
    cut, pairs = [[]], 0
    for r in routed:
        if cut[-1] and pairs + len(r.gates) > BUNDLE_PAIRS:
            cut.append([])
            pairs = 0
        cut[-1].append(r)
        pairs += len(r.gates)
    return [_bundle(some, x) for some in cut]


def _bundle(some: list[_Routed], x: Tensor) -> _Bundle:
    experts, counts = [r.expert for r in some], [len(r.gates) for r in some]
    if len(some) == 1:
        return _Bundle(experts, counts, some[0].tokens, some[0].gates)
    return _Bundle(experts, counts, torch.cat([_tokens(r, x) for r in some]), torch.cat([r.gates for r in some]))


def _tokens(r: _Routed | _Bundle, x: Tensor) -> Tensor:
    """int64, of one expert or bundle"""
    return torch.arange(x.shape[0], device=x.device) if r.tokens is None else r.tokens


def _pairs(bundles: list[_Bundle]) -> int:
    return sum(len(b.gates) for b in bundles)


def _taken(values: Tensor, bundles: list[_Bundle]) -> Iterable[Tensor]:
    """Rows of values [T, n] for one bundle after the other; of a single token no copies.

    With a gradient they are gathered at once, for each gather's backward fills a tensor of the size of all values.
    """
    if values.shape[0] == 1:
        return (values.expand(len(b.gates), -1) for b in bundles)
    if not (torch.is_grad_enabled() and values.requires_grad):
        return (values if b.tokens is None else values[b.tokens] for b in bundles)
    return values[torch.cat([_tokens(b, values) for b in bundles])].split([len(b.gates) for b in bundles])


def _add(total: Tensor, values: Tensor, tokens: Tensor | None) -> None:
    """total[tokens] += values"""
    if total.shape[0] == 1:
        total += values.sum(0, dtype=total.dtype)
    elif tokens is None:
        total += values
    else:
        total.index_add_(0, tokens, values.to(total.dtype))


def _pieces(projection: AnyProjection, x: Tensor) -> list[dict[str, Tensor]] | None:
    return projection.pieces() if projection.differentiates(x) else None
