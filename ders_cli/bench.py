"""How fast the kernels are on this machine: each operation of ders_kernels.dispatch beside torch's dense product.

    delta_matmul   x @ D.T              beside  x @ W.T with the whole expert, bf16
    synthesize     W = round(B + D)     nothing beside it
    moe_forward    a routed layer       beside  three products for each expert that has tokens
    expert_gram    E experts' products  beside  one torch product, bf16

A row's `bytes` are the least that the operation must move: the packed delta of an expert that is used, bases, inputs and
outputs, each once. `of_limit` is the time which those take at the bandwidth measured here, over the time taken: 1 is as
fast as memory allows. `gflop_s` counts the dense product's operations, whatever the kernel saves of them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from ders_kernels import dispatch
from ders_kernels.deltas import Delta, Projection
from torch import Tensor

from .bench_clock import Call, bandwidth, time_pair
from .bench_inputs import expert_bytes, random_delta
from .codecs import parse_codec
from .errors import UsageError

DELTAS = ("int8", "int4", "int3", "int2", "int1", "drop0.9", "ternary0.02", "2:4", "rank16", "int1+rank16")
LAYER_DELTAS = ("int4", "int1", "rank16")
LAYERS = ((8, 2), (16, 8))  # experts, top-k
GRAMS = (8, 64)
FEW = 16  # tokens up to which a product waits for memory, on any machine


@dataclass(frozen=True)
class Size:
    """What is run on a machine of a kind: shapes [out, in], tokens, and the most elements of an expert_gram."""

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    layer_tokens: tuple[int, ...]
    gram: int
    copied: int  # bytes whose copy gives the bandwidth
    seconds: float  # for each timing


LARGE = ((5632, 2048), (14336, 4096))
QUICK = Size(((256, 512),), (4,), (4,), 1 << 23, 1 << 26, 0.02)
SIZES = {
    "cpu": Size(LARGE, (1, 4, 16, 64, 256), (1, 4, 16, 64), 1 << 28, 1 << 29, 0.3),
    "cuda": Size(LARGE, (1, 4, 16, 64, 256, 4096), (1, 4, 16, 64, 256, 4096), 1 << 32, 1 << 31, 0.1),
}


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none. ms; bytes, flops and dense times as the module's text says."""

    op: str
    delta: str
    shape: tuple[int, int]
    tokens: int
    experts: int
    top_k: int
    bytes: int
    flops: int
    backend: str = ""
    refused: str = ""
    ms: float | None = None
    graph_ms: float | None = None
    no_graph: str = ""
    dense_ms: float | None = None
    dense_graph_ms: float | None = None
    speedup: float | None = None  # dense over ours, graphs if both are
    gb_s: float | None = None
    gflop_s: float | None = None
    of_limit: float | None = None

    @property
    def memory_bound(self) -> bool:
        return self.tokens <= FEW or self.op in ("synthesize", "expert_gram")


class Bench:
    """`backend` as in dispatch; `device` auto, cpu or cuda. Raises UsageError where there is no such device."""

    def __init__(self, backend: str, device: str, quick: bool):
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: torch finds no GPU")
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.backend, self.device, self.quick = backend, torch.device(kind), quick
        self._size = QUICK if quick else SIZES[kind]
        self.bandwidth = bandwidth(self.device, self._size.copied)  # bytes a second

    def run(self) -> Iterator[Row]:
        """Row by row, operation after operation."""
        for part in (self._delta_products, self._syntheses, self._layers, self._grams):
            yield from part()

    def _delta_products(self) -> Iterator[Row]:
        for shape in self._size.shapes:
            dense = self._matrices(shape, self._sets(2 * shape[0] * shape[1]))
            for term in DELTAS:
                delta, own = self._delta(term, shape)
                for tokens in self._size.tokens:
                    x = self._normal(tokens, shape[1])
                    moved = own + 2 * tokens * sum(shape)
                    row = Row("delta_matmul", term, shape, tokens, 1, 1, moved, 2 * tokens * shape[0] * shape[1])
                    ours = partial(_delta_product, x, delta, self.backend)
                    yield self._measured(row, x, (delta,), ours, partial(_dense_product, x, dense), len(dense))

    def _syntheses(self) -> Iterator[Row]:
        for shape in self._size.shapes:
            base = self._normal(*shape)
            for term in DELTAS:
                delta, own = self._delta(term, shape)
                row = Row("synthesize", term, shape, 0, 1, 1, own + 2 * base.nbytes, shape[0] * shape[1])
                yield self._measured(row, base, (delta,), partial(_synthesis, base, delta, self.backend), None, 1)

    def _layers(self) -> Iterator[Row]:
        for shape in self._size.shapes:
            for experts, top_k in LAYERS:
                if why := self._no_room(experts * 3 * 2 * shape[0] * shape[1]):
                    yield Row("moe_forward", "", shape, 0, experts, top_k, 0, 0, refused=why)
                    continue
                dense = [self._matrices(each, experts) for each in (shape, shape, shape[::-1])]
                for term in LAYER_DELTAS:
                    yield from self._layer(term, shape, experts, top_k, dense)

    def _layer(
        self, term: str, shape: tuple[int, int], experts: int, top_k: int, dense: list[list[Tensor]]
    ) -> Iterator[Row]:
        codec = parse_codec(term, 128)
        shapes = (shape, shape, shape[::-1])
        ffn = [Projection(self._normal(*s), random_delta(codec, s, experts, self.device)) for s in shapes]
        own = sum(expert_bytes(p.delta) for p in ffn)
        for tokens in self._size.layer_tokens:
            x, routes = self._normal(tokens, shape[1]), [self._route(tokens, experts, top_k) for _ in range(4)]
            used = sum(len(route.experts) for route in routes) / len(routes)
            moved = round(sum(p.base.nbytes for p in ffn) + used * own + 2 * x.nbytes)
            flops = 6 * tokens * top_k * shape[0] * shape[1]
            row = Row("moe_forward", term, shape, tokens, experts, top_k, moved, flops)
            ours = partial(_layer_by_kernels, x, routes, ffn, self.backend)
            by_dense = partial(_dense_layer, x, routes, dense)
            yield self._measured(row, x, tuple(p.delta for p in ffn), ours, by_dense, len(routes))

    def _grams(self) -> Iterator[Row]:
        for shape in self._size.shapes:
            for experts in GRAMS:
                width = min(shape[0] * shape[1], self._size.gram // experts)
                stack = self._normal(1, width).repeat(experts, 1)
                row = Row("expert_gram", "", (experts, width), 0, experts, 1, stack.nbytes, 2 * experts**2 * width)
                ours = partial(_gram, stack, self.backend)
                yield self._measured(row, stack, (), ours, partial(_dense_gram, stack), 1)

    def _measured(
        self, row: Row, x: Tensor, deltas: tuple[Delta, ...], ours: Call, dense: Call | None, dense_sets: int
    ) -> Row:
        try:
            module = dispatch.choose(row.op, self.backend, x, *deltas)
        except dispatch.Refused as error:
            return replace(row, refused=str(error))
        name = next(name for name, path in dispatch.BACKENDS.items() if path == module.__name__)
        if name == "triton" and self.device.type == "cpu":
            return replace(row, backend=name, refused="Triton's interpreter: its times say nothing")
        if name == "reference" and not self.quick:
            return replace(row, backend=name, refused="plain definitions: too slow at this size; --quick has them")
        sets = dense_sets if row.op == "moe_forward" else max([dense_sets, *(delta.shape[0] for delta in deltas)])
        with torch.no_grad():
            own, other = time_pair(ours, dense, sets, self.device, self._size.seconds)
        best = own.best / 1e3
        both = other is not None and None not in (own.graph, other.graph)
        speedup = None if other is None else (other.graph / own.graph if both else other.eager / own.eager)
        found = {
            "backend": name,
            "ms": own.eager,
            "graph_ms": own.graph,
            "no_graph": own.no_graph,
            "dense_ms": other and other.eager,
            "dense_graph_ms": other and other.graph,
            "speedup": speedup,
            "gb_s": row.bytes / best / 1e9,
            "gflop_s": row.flops / best / 1e9,
            "of_limit": row.bytes / self.bandwidth / best,
        }
        rounded = {key: _digits(value) if isinstance(value, float) else value for key, value in found.items()}
        return replace(row, **rounded)

    def _delta(self, term: str, shape: tuple[int, int]) -> tuple[Delta, int]:
        """As many experts as there are input sets, and the bytes of one."""
        codec = parse_codec(term, 128)
        own = expert_bytes(random_delta(codec, shape, 1, self.device))
        drawn = term.startswith("drop")  # its columns are drawn for every expert, and stay in memory: a few are enough
        return random_delta(codec, shape, min(self._sets(own), 16 if drawn else 256), self.device), own

    def _sets(self, size: int) -> int:
        """How many inputs of `size` bytes a cache can't hold. On a CPU the dense product's own weights turn it over."""
        if self.device.type == "cpu" or self.quick:
            return 4
        return max(2, -(-2 * torch.cuda.get_device_properties(self.device).L2_cache_size // size))

    def _matrices(self, shape: tuple[int, int], count: int) -> list[Tensor]:
        """bf16 [out, in], `count` of equal values in places of their own."""
        first = self._normal(*shape)
        return [first, *(first.clone() for _ in range(count - 1))]

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).mul_(0.02).to(torch.bfloat16)

    def _route(self, tokens: int, experts: int, top_k: int) -> "Route":
        scores, index = torch.rand(tokens, experts, device=self.device).topk(top_k)
        gates = scores.softmax(-1).to(torch.bfloat16)
        each = {e: (index == e).nonzero(as_tuple=True) for e in index.unique().tolist()}
        return Route(index, gates, {e: (token, gates[token, place, None]) for e, (token, place) in each.items()})

    def _no_room(self, size: int) -> str:
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info()[0]
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return "" if 1.5 * size < free else f"the dense experts take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


@dataclass(frozen=True)
class Route:
    """index int64 [T, k], gates [T, k]; experts: number -> (its tokens, their gates [t, 1])."""

    index: Tensor
    gates: Tensor
    experts: dict[int, tuple[Tensor, Tensor]]


def _delta_product(x: Tensor, delta: Delta, backend: str, number: int) -> Tensor:
    return dispatch.delta_matmul(x, delta, number % delta.shape[0], backend=backend)


def _dense_product(x: Tensor, weights: list[Tensor], number: int) -> Tensor:
    return torch.nn.functional.linear(x, weights[number % len(weights)])


def _synthesis(base: Tensor, delta: Delta, backend: str, number: int) -> Tensor:
    return dispatch.synthesize(base, delta, number % delta.shape[0], backend=backend)


def _layer_by_kernels(x: Tensor, routes: list[Route], ffn: list[Projection], backend: str, number: int) -> Tensor:
    route = routes[number % len(routes)]
    return dispatch.moe_forward(x, route.index, route.gates, *ffn, backend=backend)


def _dense_layer(x: Tensor, routes: list[Route], weights: list[list[Tensor]], number: int) -> Tensor:
    gate, up, down = weights
    out = torch.zeros_like(x)
    for e, (tokens, gates) in routes[number % len(routes)].experts.items():
        own = x[tokens]
        hidden = torch.nn.functional.silu(own @ gate[e].T) * (own @ up[e].T)
        out.index_add_(0, tokens, hidden @ down[e].T * gates)
    return out


def _gram(stack: Tensor, backend: str, number: int) -> Tensor:
    return dispatch.expert_gram(stack, backend=backend)


def _dense_gram(stack: Tensor, number: int) -> Tensor:
    return stack @ stack.T


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
