"""Single products of the CPU kernels: x @ D.T beside torch's bf16 linear of the full expert and torch's int4 kernel.

    python docs/measure/products.py                                       every shape and codec, some minutes
    python docs/measure/products.py --threads 1 --delta int1 --tokens 1   a part

Random deltas of [5632, 2048], [2048, 5632] and [4096, 4096], groups of 128, several experts in turn; calls interleaved, so
that each finds its weights in memory and not in a cache. Medians in ms; in brackets CPU time of all threads. Above 1 the
product with the delta is faster: it stands beside one product with the base for all experts of a token. `whole` is x @ W.T
with W = round(B + D) made in this call, block by block; `make W` the making alone.
"""

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from ders_kernels.cpu_ops import backend, blocks
from ders_kernels.deltas import Delta

from ders_cli.codecs import parse_codec
from ders_cli.runtime.deltas import packed_delta
from ders_cli.runtime.dtypes import TORCH

SHAPES = [(5632, 2048), (2048, 5632), (4096, 4096)]
DELTAS = ["int8", "int4", "int2", "int1", "rank16", "drop0.9", "ternary0.02", "2:4"]
TOKENS = [1, 4, 16, 64, 256]
EXPERTS, GROUP = 4, 128


def random_delta(term: str, shape: tuple[int, int]) -> Delta:
    """The same values for all experts, each with its own memory: they make no difference to the time."""
    codec, random = parse_codec(term, GROUP), np.random.default_rng(0)
    if term.startswith("rank"):  # an SVD would take minutes
        parts = {n: random.standard_normal(s.shape).astype(np.float32) for n, s in codec.spec(shape).items()}
        made = {name: torch.from_numpy(part).bfloat16() for name, part in parts.items()}
    else:
        parts = codec.encode(random.standard_normal(shape).astype(np.float32), 0, 0)
        made = {n: torch.from_numpy(parts[n]).view(TORCH[s.dtype]) for n, s in codec.spec(shape).items()}
    stacked = {name: part.expand(EXPERTS, *part.shape).clone() for name, part in made.items()}
    return packed_delta(codec, stacked, shape[1], tuple(range(EXPERTS)))


def measure(calls: dict[str, Callable[[int], object]], seconds: float) -> dict[str, tuple[float, float]]:
    """{name: (wall ms, CPU ms)}: medians of calls in turn, at least 3 each."""
    times, begin = defaultdict(list), time.perf_counter()
    for turn in itertools.count():
        if turn >= 4 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call(turn % EXPERTS)
            if turn:  # the first one makes what is made once
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {n: tuple(statistics.median(v) * 1e3 for v in zip(*t, strict=True)) for n, t in times.items()}


def table(shape: tuple[int, int], terms: list[str], tokens: list[int], seconds: float) -> None:
    out, width = shape
    full = [torch.randn(shape).bfloat16() for _ in range(EXPERTS)]
    codes = [torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, shape, dtype=torch.int32), 1) for _ in full]
    scales = torch.rand(width // GROUP, out, 2).bfloat16()
    deltas = {term: random_delta(term, shape) for term in terms}
    for expert in range(EXPERTS):
        for delta in deltas.values():
            backend.delta_matmul(torch.zeros(1, width).bfloat16(), delta, expert)
    for count in tokens:
        x = torch.randn(count, width).bfloat16()
        calls: dict[str, Callable[[int], object]] = {
            "linear": lambda e, x=x: torch.mm(x, full[e].t()),
            "kernel": lambda e, x=x: torch._weight_int4pack_mm_for_cpu(x, codes[e], GROUP, scales),
        }
        for term, delta in deltas.items():
            calls[term] = lambda e, x=x, delta=delta: backend.delta_matmul(x, delta, e)
            calls[f"whole {term}"] = lambda e, x=x, delta=delta: blocks.whole_products(x, full[0], delta, [e], [len(x)])
            if count == tokens[0]:
                calls[f"make {term}"] = lambda e, delta=delta: backend.synthesize(full[0], delta, e)
        found = measure(calls, seconds)
        linear, kernel = found["linear"], found["kernel"]
        for term in terms:
            own, whole, made = found[term], found[f"whole {term}"], found.get(f"make {term}")
            print(
                f"| {torch.get_num_threads()} | {out} x {width} | {count} | {term} | {_both(own)} | {_both(linear)} "
                f"| {_ratio(linear, own)} | {_both(kernel)} | {_ratio(kernel, own)} | {_both(whole)} "
                f"| {_both(made) if made else ''} |",
                flush=True,
            )


def _both(times: tuple[float, float]) -> str:
    return f"{times[0]:.2f} ({times[1]:.2f})"


def _ratio(of: tuple[float, float], to: tuple[float, float]) -> str:
    return f"{of[0] / to[0]:.2f} ({of[1] / to[1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--delta", action="append", help=f"default: {', '.join(DELTAS)}")
    parser.add_argument("--tokens", type=int, action="append", help="default: 1, 4, 16, 64 and 256")
    parser.add_argument("--shape", action="append", help="out x in, as 5632x2048; default: three")
    parser.add_argument("--seconds", type=float, default=2, help="for each number of tokens (default: 2)")
    given = parser.parse_args()
    torch.manual_seed(0)
    shapes = [tuple(int(side) for side in shape.split("x")) for shape in given.shape or []] or SHAPES
    print(
        "| threads | out x in | tokens | delta | x @ D.T | linear | times as fast | int4 kernel | times as fast ",
        end="",
    )
    print("| whole | make W |\n|---|---|---|---|---|---|---|---|---|---|---|")
    with torch.no_grad():
        for threads in given.threads or (1, 2):
            torch.set_num_threads(threads)
            for shape in shapes:
                table(shape, given.delta or DELTAS, given.tokens or TOKENS, given.seconds)


if __name__ == "__main__":
    main()
