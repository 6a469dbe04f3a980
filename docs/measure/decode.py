"""Speed of a layer's packed experts beside transformers' own, on this machine's CPU.

    python docs/measure/decode.py                                         everything, a few minutes
    python docs/measure/decode.py --experts 8 --top-k 2 --delta int4      one configuration

Random bf16 layers of hidden 2048 and inner 5632, several of them in turn, so that no cache of the CPU holds their
weights. Stock is the best of transformers' eager, batched_mm and grouped_mm MixtralExperts, beside which the last, its
default, is given by name. Calls are interleaved; medians of wall time and of CPU time (all threads), in ms per layer and call. MB: bytes of expert weights that a call
has to read, for a token. `no cache` is with cache_bytes = 0: nothing synthesised is kept.
"""

import argparse
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from ders_kernels.counter_rng import make_key
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.codecs import parse_codec
from ders_cli.hf.experts import HfExperts
from ders_cli.runtime.group import RuntimeGroup
from ders_cli.runtime.packed import Packed

HIDDEN, INNER, GROUP_SIZE = 2048, 5632, 128
MATRIX = HIDDEN * INNER * 2  # bytes
STOCK = ("eager", "batched_mm", "grouped_mm")
BATCHED_PAIRS = 16  # batched_mm copies an expert for every pair of token and expert: beyond this it needs gigabytes


def stock_layer(experts: int) -> MixtralExperts:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=experts)
    layer = MixtralExperts(config).bfloat16().eval()
    for p in layer.parameters():
        torch.nn.init.uniform_(p, -0.02, 0.02)
    return layer


def packed_layer(delta: str, experts: int) -> HfExperts:
    """Random parts: what they say makes no difference to the time."""
    codec, groups = parse_codec(delta, GROUP_SIZE), []
    for projection in ("gate", "up", "down"):
        shape = (HIDDEN, INNER) if projection == "down" else (INNER, HIDDEN)
        name = f"model.layers.0.mlp.experts.{projection}_proj"
        parts = {f"delta.{part}": TensorSpec((experts, *s.shape), s.dtype) for part, s in codec.spec(shape).items()}
        keys = tuple(make_key(0, name, str(e)) for e in range(experts))
        parts["base"] = TensorSpec(shape, "BF16")
        groups.append(RuntimeGroup(name, projection, shape, "BF16", codec, keys, tuple(range(experts)), parts))
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=experts)
    config._experts_implementation = "grouped_mm"  # transformers' default
    with torch.device("meta"):
        stock = MixtralExperts(config)
    layer = HfExperts(stock, groups, None).to_empty(device="cpu").eval()
    for p in layer.parameters():
        p.requires_grad_(False)
        if p.is_floating_point():
            torch.nn.init.uniform_(p, -0.02, 0.02)
        else:
            p.random_(0, 256)
    return layer


def routing(batch: int, top_k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(batch, experts).softmax(1).topk(top_k, dim=1)
    return scores.indices, scores.values.bfloat16()


def measure(calls: dict[str, Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], object]], draws: list) -> dict:
    """{name: (wall ms, CPU ms)}: medians over draws (layer, x, index, weights), each given to every call in turn."""
    times = defaultdict(list)
    for layer, *given in draws:
        for turn, (name, call) in enumerate(calls.items()):
            wall, cpu = time.perf_counter(), time.process_time()
            call(layer + turn, *given)  # layers in turn, so that no call finds what the one before it has read
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {n: tuple(statistics.median(v) * 1e3 for v in zip(*t, strict=True)) for n, t in times.items()}


def warm_up(layer: HfExperts, experts: int) -> None:
    """Every expert once, both ways: codes are widened and, if the cache has room, weights synthesised."""
    every = torch.randn(experts, HIDDEN).bfloat16(), torch.arange(experts)[:, None], torch.ones(experts, 1)
    for way in ("apart", "whole") if layer.cache_bytes else ("apart",):
        layer.way = way
        layer(*every)


def bytes_read(layer: HfExperts, batch: int, top_k: int, active: float, way: str) -> float:
    """MB for a token: gate, up and down of the active experts, or the bases once and the active deltas."""
    whole = 3 * MATRIX * active
    if way == "whole":
        return whole / batch / 1e6
    pairs = 3 * MATRIX
    delta = 0
    for projection in (layer.gate_proj, layer.up_proj, layer.down_proj):
        for name, part in projection.delta.tensors().items():
            wide = name == "codes" and isinstance(projection.form, Packed)  # the kernel reads 4 bits, or two times 4
            delta += HIDDEN * INNER // 2 * (1 + (projection.group.codec.bits > 4)) if wide else part[0].nbytes
    return (pairs + delta * active) / batch / 1e6


def compare(experts: int, top_k: int, delta: str, batches: list[int], layers: int, rounds: int, ways: bool) -> None:
    gc.collect()  # layers of before have reference cycles, and would still be counted to want room
    stock, packed = [stock_layer(experts) for _ in range(layers)], [packed_layer(delta, experts) for _ in range(layers)]
    whole = 3 * MATRIX * experts * layers

    def run_stock(kind: str) -> Callable:
        def call(layer, x, index, weights):
            module = stock[layer % layers]
            module.config._experts_implementation = kind
            module(x, index, weights)

        return call

    def run_packed(way: str) -> Callable:
        def call(layer, x, index, weights):
            module = packed[layer % layers]
            module.way = way
            module(x, index, weights)

        return call

    for cache in (2 * whole, 0):
        packed[0].cache_bytes = cache
        for layer in packed:
            warm_up(layer, experts)
        for batch in batches:
            draws = []
            for i in range(rounds * layers):
                x = torch.randn(batch, HIDDEN).bfloat16()
                draws.append((i, x, *routing(batch, top_k, experts)))
            kinds = [k for k in STOCK if k != "batched_mm" or batch * top_k <= BATCHED_PAIRS]
            calls = {k: run_stock(k) for k in kinds}
            calls |= {way: run_packed(way) for way in (("auto", "apart", "whole") if ways else ("auto",))}
            found = measure(calls, draws)
            best = min(kinds, key=lambda k: found[k][0])
            active = statistics.mean(d[2].unique().numel() for d in draws)
            read = [bytes_read(packed[0], batch, top_k, active, way) for way in ("whole", "apart")]
            for way in calls.keys() - set(kinds):
                print(
                    f"| {experts} | {top_k} | {delta} | {'cache' if cache else 'no cache'} | {way} | {batch} "
                    f"| {found[best][0]:.2f} ({best}) | {found[way][0]:.2f} | {found[best][0] / found[way][0]:.2f} "
                    f"| {found[best][1]:.2f} | {found[way][1]:.2f} | {found['grouped_mm'][0]:.2f} "
                    f"| {found['grouped_mm'][0] / found[way][0]:.2f} ({found['grouped_mm'][1] / found[way][1]:.2f}) "
                    f"| {read[0]:.1f} | {read[1]:.1f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, action="append", help="experts of a layer (default: 8 and 16)")
    parser.add_argument("--top-k", type=int, action="append", help="experts of a token (default: 2 and 8)")
    parser.add_argument("--delta", action="append", help="default: int4, int1 and rank16")
    parser.add_argument("--batch", type=int, action="append", help="tokens (default: 1, 4, 16, 64 and 256)")
    parser.add_argument("--layers", type=int, default=2, help="layers in turn (default: 2)")
    parser.add_argument("--rounds", type=int, default=4, help="timed calls of each layer (default: 4)")
    parser.add_argument("--ways", action="store_true", help="also force `apart` and `whole`")
    given = parser.parse_args()
    torch.manual_seed(0)
    print(
        "| E | top-k | delta | | way | tokens | stock ms | packed ms | times as fast | stock CPU | packed CPU ", end=""
    )
    print("| grouped_mm ms | times as fast (CPU) | stock MB | apart MB |\n" + "|---" * 15 + "|")
    with torch.no_grad():
        for experts in given.experts or (8, 16):
            for top_k in given.top_k or (2, 8):
                for delta in given.delta or ("int4", "int1", "rank16"):
                    batches = given.batch or [1, 4, 16, 64, 256]
                    compare(experts, top_k, delta, batches, given.layers, given.rounds, given.ways)


if __name__ == "__main__":
    main()
