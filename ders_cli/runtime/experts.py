"""The experts of one layer: y = sum over a token's experts k of g_k FFN_k(x), on DeRS projections.

*Apart*: since gate and up read the same x for all experts, and down is linear, with SwiGLU

    h_k = act(x Bg' + x Dg_k') * (x Bu' + x Du_k')        y = (sum_k g_k h_k) Bd' + sum_k g_k (h_k Dd_k')

so the products with the bases are made once for a token, whatever the number of its experts. *Whole*: x W_k' with
synthesised weights, as a stock expert does. Each projection goes the way that is faster (choice.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .choice import choose
from .group import RuntimeGroup
from .projection import WEIGHTS, DersProjection

Activate = Callable[[Tensor | None, Tensor], Tensor]
Biases = Callable[[str, int], Tensor | None]


# Most pairs of token and expert whose activations and sums are made in one call, so that all threads have work; more
# would not stay in the CPU's caches. Whole, 8 experts on two cores, ms a layer, one expert a call | 512 | 4096:
# 64 tokens top-2 36.7 | 32.9 | 32.4; 256 tokens top-8 185 | 180 | 200.
BUNDLE_PAIRS = 512


class _Routed(NamedTuple):
    """The tokens of one expert."""

    expert: int
    tokens: Tensor | None  # int64 [t]; None: all of them, in order
    gates: Tensor  # [t, 1] fp32


class DersExperts(nn.Module):
    """Stands in for transformers' *Experts modules.

    activate(gate [t, inner] or None, up [t, inner]) -> [t, inner]; biases(projection, expert) -> [out] or None, asked
    for at each call. `way` is "auto", or "apart" or "whole" for all. `gate_proj`, `up_proj`, `down_proj` are
    DersProjections, or those of `slice0`, `slice1`, ... where the FFN was cut into slices with a base each.
    """

    def __init__(
        self,
        groups: Sequence[RuntimeGroup],
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
                    owner.add_module(f"{group.projection}_proj", DersProjection(group, device, dtype))
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
        xs = list(_taken(x, routed))
        ups = self._products(owner.up_proj, x, xs, routed)
        gates = self._products(owner.gate_proj, x, xs, routed) if owner.gate_proj else None
        down, out = owner.down_proj, torch.zeros(x.shape[0], owner.down_proj.group.shape[0], device=x.device)
        apart = self._apart(down, x, _mean_tokens(routed))
        mixed = torch.zeros(x.shape[0], down.group.shape[1], device=x.device) if apart else None  # sum_k g_k h_k
        pieces = _pieces(down, x)
        for bundle in _bundles(routed):
            tokens, weights = _joined_tokens(bundle, x), torch.cat([r.gates for r in bundle])
            gate = torch.cat([next(gates) for _ in bundle]) if gates else None
            hidden = self.activate(gate, torch.cat([next(ups) for _ in bundle]))
            if apart:
                _add(mixed, hidden * weights, tokens)
            ys = []
            for r, own in zip(bundle, hidden.split([len(r.gates) for r in bundle]), strict=True):
                y = self._down(down, own, r.expert, apart, pieces)
                ys += [] if y is None else [y]
            if ys:
                _add(out, torch.cat(ys) * weights, tokens)
        return out + down.base_product(mixed.to(x.dtype)) if apart else out

    def _down(
        self, down: DersProjection, hidden: Tensor, expert: int, apart: bool, pieces: list[dict[str, Tensor]] | None
    ) -> Tensor | None:
        """[t, inner] -> [t, hidden] of one expert with its bias, without the base's part if `apart`; None: nothing."""
        member, y = down.member_of[expert], None
        if not apart:
            y = down.whole_product(hidden, member, pieces and pieces[member])
        elif not down.no_delta:
            y = down.delta_product(hidden, member, pieces and pieces[member])
        bias = self.biases("down", expert) if self.biases else None
        if bias is None:
            return y
        return bias.expand(hidden.shape[0], -1) if y is None else y + bias

    def _products(
        self, projection: DersProjection, x: Tensor, xs: list[Tensor], routed: list[_Routed]
    ) -> Iterator[Tensor]:
        """[t, out] for one expert after the other: its x @ W.T and bias."""
        pieces = _pieces(projection, x)
        apart = self._apart(projection, x, _mean_tokens(routed))
        of_base = _taken(projection.base_product(x), routed) if apart else [None] * len(routed)
        for r, own, y in zip(routed, xs, of_base, strict=True):
            member = projection.member_of[r.expert]
            if y is None:
                y = projection.whole_product(own, member, pieces and pieces[member])
            elif not projection.no_delta:
                y = y + projection.delta_product(own, member, pieces and pieces[member])
            bias = self.biases(projection.group.projection, r.expert) if self.biases else None
            yield y if bias is None else y + bias

    def _apart(self, projection: DersProjection, x: Tensor, tokens: float) -> bool:
        """tokens: the mean number for an expert that has any."""
        if self.way != "auto" or projection.no_delta:
            return self.way != "whole"
        group, gradient = projection.group, projection.differentiates(x)
        form = projection.form if projection.form and projection.form.runs(projection, x, gradient) else None
        kept = not projection.training and projection.has_room()
        return choose(group.codec, form, group.shape, tokens, kept, gradient) == "apart"


def _mean_tokens(routed: list[_Routed]) -> float:
    return sum(r.gates.shape[0] for r in routed) / len(routed)


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


def _taken(values: Tensor, routed: list[_Routed]) -> Iterable[Tensor]:
    """Rows of values [T, n] for one expert after the other.

    With a gradient they are gathered at once, for each gather's backward fills a tensor of the size of all values.
    """
    if not (torch.is_grad_enabled() and values.requires_grad):
        return (values if r.tokens is None else values[r.tokens] for r in routed)
    return values[_joined_tokens(routed, values)].split([len(r.gates) for r in routed])


def _bundles(routed: list[_Routed]) -> Iterator[list[_Routed]]:
    """Experts that go through activation and sums together."""
    bundle, pairs = [], 0
    for r in routed:
        if bundle and pairs + len(r.gates) > BUNDLE_PAIRS:
            yield bundle
            bundle, pairs = [], 0
        bundle.append(r)
        pairs += len(r.gates)
    if bundle:
        yield bundle


def _joined_tokens(bundle: list[_Routed], x: Tensor) -> Tensor:
    """int64 [pairs]"""
    every = torch.arange(x.shape[0], device=x.device)
    return torch.cat([every if r.tokens is None else r.tokens for r in bundle])


def _add(total: Tensor, values: Tensor, tokens: Tensor) -> None:
    """total[tokens] += values"""
    total.index_add_(0, tokens, values.to(total.dtype))


def _pieces(projection: DersProjection, x: Tensor) -> list[dict[str, Tensor]] | None:
    return projection.pieces() if projection.differentiates(x) else None
