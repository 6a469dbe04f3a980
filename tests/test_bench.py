"""`ders bench`: rows for everything, refusals as rows, inputs that are valid, and a clock that alternates."""

import sys
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from command import ders, done
from ders_kernels import dispatch, reference, reference_backend
from ders_kernels.deltas import Kept, Projection

from ders_cli import bench, bench_clock
from ders_cli.bench_inputs import expert_bytes, random_delta
from ders_cli.codecs import parse_codec

CPU = torch.device("cpu")
OPS = ("delta_matmul", "synthesize", "moe_forward", "expert_gram")
ROWS = 2 * len(bench.DELTAS) + len(bench.LAYER_DELTAS) * len(bench.LAYERS) + len(bench.GRAMS)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """--quick, and quicker."""
    size = bench.Size(((24, 64),), (3,), (3,), 1 << 12, 1 << 16, 1e-4)
    monkeypatch.setattr(bench, "QUICK", size)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend `cpu` runs as `reference` does, but for 4-bit codes and grams."""
    module = ModuleType("picky")
    vars(module).update({op: getattr(reference_backend, op) for op in OPS})
    module.refuses = lambda op, x, deltas: (
        "no grams" if op == "expert_gram" else "no 4 bits" if any(getattr(d, "bits", 0) == 4 for d in deltas) else ""
    )
    monkeypatch.setitem(sys.modules, "picky", module)
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", "picky")


def test_every_row(tiny):
    report = done("bench", "--quick", "--backend", "reference", "--device", "cpu", "--json").json
    rows = report["rows"]
    assert (report["schema"], report["kind"], report["backend"], len(rows)) == (1, "cpu", "reference", ROWS)
    assert {"torch", "triton", "numpy", "numba"} <= set(report["versions"]) and report["bandwidth_gb_s"] > 0.1
    assert tuple(dict.fromkeys(row["op"] for row in rows)) == OPS
    assert [row["delta"] for row in rows if row["op"] == "synthesize"] == list(bench.DELTAS)
    for row in rows:
        assert row["ms"] > 0 and not row["refused"] and row["backend"] == "reference" and row["graph_ms"] is None
        assert (row["dense_ms"] is None) == (row["op"] == "synthesize")
        if row["dense_ms"]:
            assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ms"], rel=2e-3)  # four digits each
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6, rel=2e-3)
        assert row["of_limit"] == pytest.approx(row["gb_s"] / report["bandwidth_gb_s"], rel=2e-3)


def test_kernels_is_what_bench_does(tiny):
    plain, named = (
        done("bench", *name, "--quick", "--backend", "reference", "--json").json for name in ((), ("kernels",))
    )
    assert [(row["op"], row["delta"]) for row in plain["rows"]] == [(row["op"], row["delta"]) for row in named["rows"]]
    assert len(named["rows"]) == ROWS and named["command"] == plain["command"] == "bench"


def test_bytes_and_operations_by_hand(tiny):
    rows = done("bench", "--quick", "--backend", "reference", "--json").json["rows"]
    by = {(row["op"], row["delta"], row["top_k"], row["experts"]): (row["bytes"], row["flops"]) for row in rows}
    codes, scales, ends = 24 * 32, 24 * 2, 3 * (24 + 64) * 2  # 4 bits a weight, one group a row; 3 tokens in bf16
    assert by["delta_matmul", "int4", 1, 1] == (codes + scales + ends, 2 * 3 * 24 * 64)
    assert by["delta_matmul", "drop0.9", 1, 1][0] == 24 * 6 * 2 + ends  # 6 of 64 kept, nothing says where
    assert by["synthesize", "int4", 1, 1][0] == codes + scales + 2 * 24 * 64 * 2
    assert by["expert_gram", "", 1, 8] == (8 * 512 * 2, 2 * 64 * 512)
    # top-8 of 16 for 3 tokens: 3 bases, and the deltas of 8 to 16 experts that are used (down's rows: 64, of 12 bytes)
    own = 2 * (codes + scales) + 64 * 12 + 64 * 2
    least, flops = 3 * 24 * 64 * 2 + 2 * 3 * 64 * 2 + 8 * own, 6 * 3 * 8 * 24 * 64
    assert (
        least <= by["moe_forward", "int4", 8, 16][0] <= least + 8 * own and by["moe_forward", "int4", 8, 16][1] == flops
    )


def test_refusals_are_rows(tiny, picky):
    rows = done("bench", "--quick", "--backend", "cpu", "--device", "cpu", "--json").json["rows"]
    refused = {(row["op"], row["delta"]): row for row in rows if row["refused"]}
    assert set(refused) == {(op, "int4") for op in OPS[:3]} | {("expert_gram", "")} and len(rows) == ROWS
    assert refused["delta_matmul", "int4"]["refused"] == "delta_matmul: backend cpu: no 4 bits"
    assert refused["delta_matmul", "int4"]["ms"] is None
    ran = done("bench", "--quick", "--backend", "cpu", "--device", "cpu")
    assert "  - expert_gram: backend cpu: no grams" in ran.out and ran.out.count("refused") == 6 and not ran.err


def test_definitions_are_not_timed_at_full_size(tiny, monkeypatch):
    monkeypatch.setitem(bench.SIZES, "cpu", bench.QUICK)
    rows = done("bench", "--backend", "reference", "--device", "cpu", "--json").json["rows"]
    assert len(rows) == ROWS and all("too slow at this size; --quick" in row["refused"] for row in rows)


def test_no_room_is_a_row(tiny, monkeypatch):
    monkeypatch.setattr(bench.os, "sysconf", lambda name: 100)
    rows = done("bench", "--quick", "--backend", "reference", "--device", "cpu", "--json").json["rows"]
    assert ["the dense experts take 0.0 GB" in r["refused"] for r in rows if r["op"] == "moe_forward"] == [True, True]


def test_usage():
    assert ders("bench", "--backend", "gpu").code == 2
    if not torch.cuda.is_available():
        ran = ders("bench", "--device", "cuda", "--json")
        assert ran.code == 2 and "torch finds no GPU" in ran.err and ran.json["error"]["exit_code"] == 2


def test_what_auto_takes_is_said_once(tiny, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", {"reference": dispatch.BACKENDS["reference"]})
    monkeypatch.setattr(dispatch, "_said", set())
    assert done("bench", "--quick", "--device", "cpu").err.count("ders: delta_matmul on cpu: reference") == 1


@pytest.mark.parametrize("shape", [(1, 64), (37, 61)], ids=str)
@pytest.mark.parametrize("term", [*bench.DELTAS, "top0.02", "drop0.5+int4"])
def test_random_deltas_are_valid(term, shape):
    codec, (out, width) = parse_codec(term, 128), shape
    delta = random_delta(codec, shape, 3, CPU)
    assert delta.shape == (3, *shape)
    decoded = torch.stack([reference.decode(delta, expert) for expert in range(3)])
    assert decoded.isfinite().all() and decoded.any()
    assert expert_bytes(delta) == sum(spec.nbytes for spec in codec.spec(shape).values())
    if isinstance(delta, Kept):
        columns = reference.kept_columns(delta, 2)
        assert columns.shape == (out, delta.kept) and 0 <= columns.min() and columns.max() <= width
        used = columns < width
        assert ((columns.diff(dim=1) > 0) | ~used[:, 1:]).all() and used.any()
    same = (decoded[0] == decoded[1]).float().mean()
    assert same < (1.0 if delta.shape[1] == 1 else 0.999)  # experts aren't copies of one


@pytest.mark.parametrize(("experts", "top_k"), bench.LAYERS)
def test_the_dense_layer_is_the_same_layer(tiny, experts, top_k):
    """So that a ratio compares like with like: experts that are the base, through both."""
    run = bench.Bench("reference", "cpu", True)
    route, x = run._route(9, experts, top_k), torch.randn(9, 64).bfloat16()
    assert route.index.shape == (9, top_k) and all(len(set(row)) == top_k for row in route.index.tolist())
    weights = [run._matrices(shape, experts) for shape in ((24, 64), (24, 64), (64, 24))]
    for matrices in weights:
        assert len({m.data_ptr() for m in matrices}) == experts  # in places of their own
    ffn = [Projection(matrices[0], None) for matrices in weights]
    expected = reference.moe_forward(x, route.index, route.gates, *ffn, "silu")
    error = (bench._dense_layer(x, [route], weights, 0).double() - expected).norm() / expected.norm()
    assert error < 2**-6  # every product, and every sum of top_k, is rounded to bf16


def test_the_two_alternate_and_take_sets_in_turn(monkeypatch):
    """A B A B ..., with sets 0 1 2 0 ...; medians, of which a slow call is no part."""
    ran, now = [], [0.0]
    lasts = {"A": 1e-3, "B": 3e-3}

    def call(name):
        def run(number):
            ran.append((name, number))
            now[0] += 1.0 if len(ran) == 9 else lasts[name]

        return run

    monkeypatch.setattr(bench_clock.time, "perf_counter", lambda: now[0])
    ours, dense = bench_clock.time_pair(call("A"), call("B"), 3, CPU, 0.51)
    assert (ours.eager, dense.eager) == (pytest.approx(1), pytest.approx(3)) and ours.graph is None
    assert ran[:6] == [(name, number) for name in "AB" for number in range(3)]  # warm: compiled, every set once
    timed = ran[6:]
    assert timed == [(name, i % 3) for i in range(len(timed) // 2) for name in "AB"] and len(timed) >= 6


@pytest.mark.parametrize(("copy", "read", "expected"), [(1e-3, 1e-3, 2e9), (4e-3, 1e-3, 1e9)])
def test_bandwidth_is_the_better_of_copy_and_read(monkeypatch, copy, read, expected):
    """Seconds for 1 MB, which a copy moves twice; ten times each, of which the fastest counts."""
    times = [copy + slow for slow in range(10)] + [read + slow for slow in reversed(range(10))]
    monkeypatch.setattr(bench_clock, "_seconds", lambda call, number: times.pop(0))
    assert bench_clock.bandwidth(CPU, 1_000_000) == pytest.approx(expected) and not times


def test_a_speedup_compares_graph_with_graph(tiny, monkeypatch):
    ours, dense = bench_clock.Times(4.0, 1.0), bench_clock.Times(8.0, 3.0)
    monkeypatch.setattr(bench, "time_pair", lambda *_: (ours, dense))
    rows = done("bench", "--quick", "--backend", "reference", "--device", "cpu", "--json").json["rows"]
    assert rows[0]["speedup"] == 3 and rows[0]["gb_s"] == pytest.approx(rows[0]["bytes"] / 1e6, rel=1e-3)
    ours = replace(ours, graph=None, no_graph="it waits")
    rows = done("bench", "--quick", "--backend", "reference", "--device", "cpu", "--json").json["rows"]
    assert rows[0]["speedup"] == 2 and rows[0]["no_graph"] == "it waits"


class _Gpu:
    """torch.cuda's names that the clock uses. A call takes 2 ms on the GPU's clock, 1 ms in a graph of it."""

    def __init__(self):
        gpu = self
        self.now, self.capturing, self.captured, self.stream_now = 0.0, False, 0, "default"

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return end.at - self.at

        class CUDAGraph:
            def replay(self):
                gpu.now += gpu.captured

        class Stream:
            wait_stream = lambda self, other: None  # noqa: E731

        self.Event, self.CUDAGraph, self.Stream = Event, CUDAGraph, Stream

    def run(self, number):
        self.captured, self.now = self.captured + self.capturing, self.now + 2 * (not self.capturing)

    @contextmanager
    def graph(self, graph):
        self.capturing, self.stream_now = True, "capture"
        try:
            yield
        finally:
            self.capturing = False
        self.stream_now = "default"  # as in torch: not if the capture failed

    @contextmanager
    def stream(self, stream):
        yield

    def current_stream(self):
        return self.Stream()

    def set_stream(self, stream):
        self.stream_now = "default"

    def synchronize(self):
        """Nothing runs behind."""


def test_a_gpus_clock(monkeypatch):
    """Eager and graph, each call's share; a capture that fails says why, and what follows goes on."""
    gpu = _Gpu()
    for name in ("Event", "CUDAGraph", "Stream", "graph", "stream", "current_stream", "set_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpu, name))
    ours, dense = bench_clock.time_pair(gpu.run, None, 5, torch.device("cuda"), 0.02)
    assert (ours, dense) == (bench_clock.Times(2, 1), None) and gpu.captured == 5  # every set once

    def waits(number):
        if gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        gpu.run(number)

    ours, _ = bench_clock.time_pair(waits, None, 3, torch.device("cuda"), 0.02)
    assert ours == bench_clock.Times(2, None, "operation not permitted when stream is capturing")
    assert ours.best == 2 and gpu.stream_now == "default"


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    rows = done("bench", "--quick", "--device", "cuda", "--json").json["rows"]
    products = [row for row in rows if row["op"] == "delta_matmul"]
    assert all(row["ms"] > 0 and (row["graph_ms"] or row["no_graph"]) and row["dense_graph_ms"] for row in products)
