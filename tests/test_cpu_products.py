"""The CPU backend against reference.py: every delta, awkward shapes, both ways of a layer.

Memory that torch leaves uninitialised is filled with NaN here, so an entry that no kernel writes is seen.
Tolerances are of the sum of a result's terms without their signs: FP32 for sums of up to some hundred fp32 products in
another order; BF16 for one rounding of the result to bf16 (2^-8 at most); TOLERANCE[dtype] for two roundings, of which one
is D's or that between two products.
"""

import logging

import numpy as np
import pytest
import torch
from ders_kernels import dispatch, reference
from ders_kernels.cpu_ops import backend, blocks, four_bits, layer, scattered, short, tables
from ders_kernels.deltas import Ints, LowRank, Projection
from test_packed_delta import CODECS, packed
from torch import Tensor

FP32, BF16 = 1e-5, 2**-8 + 1e-5
TOLERANCE = {torch.float32: FP32, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 1), (3, 61), (16, 128), (48, 70), (100, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def uninitialised_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: Tensor, expected: Tensor, terms: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    assert found.isfinite().all()
    room = tolerance * terms + torch.finfo(found.dtype).smallest_normal * tolerance
    worst = ((found.double() - expected).abs() / room).max() if found.numel() else 0
    assert worst <= 1, worst


def ints(bits: int, shape: tuple[int, int], experts: int, group: int = 32) -> Ints:
    out, width = shape
    random = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 256, (experts, out, -(-width * bits // 8)), dtype=torch.uint8, generator=random)
    return Ints(codes, normal(experts, out, -(-width // group), seed=bits).bfloat16(), bits, group, width)


# --- one product ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("delta", CODECS)
def test_delta_matmul(delta, shape):
    _, made, _ = packed(delta, shape, (11, 2**64 - 1))
    for dtype in DTYPES:
        for tokens in (1, 5, 70):  # 70 is past what any short way is taken for, but low rank's
            x = normal(tokens, shape[1], dtype=dtype)
            for expert in (1, 0):
                found, change = backend.delta_matmul(x, made, expert), reference.decode(made, expert).double()
                assert found.dtype == dtype
                near(found, x.double() @ change.T, x.double().abs() @ _terms(made, expert).T, TOLERANCE[dtype])


def _terms(delta, expert: int) -> Tensor:
    """|D|; of low rank |left| |right|, in which a rounding in between is small."""
    if isinstance(delta, LowRank):
        return delta.left[expert].double().abs() @ delta.right[expert].double().abs()
    if hasattr(delta, "first"):
        return _terms(delta.first, expert) + _terms(delta.then, expert)
    return reference.decode(delta, expert).double().abs()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [32, 128])
def test_codes_of_every_width(bits, group):
    """Both kernels, on rows that fill no block of 64 and groups that the last inputs don't fill."""
    for out, width in ((16, 33), (80, 200), (64, 128)):
        made = ints(bits, (out, width), 3, group)
        x = normal(5, width, dtype=torch.bfloat16)
        for expert in (2, 0):
            expected, terms = reference.delta_matmul(x, made, expert), x.double().abs() @ _terms(made, expert).T
            near(four_bits.product(x, four_bits.pack(made, expert)), expected, terms, BF16)
            if bits <= 2:
                near(tables.products(x, tables.arrange(made), [expert], [5]), expected, terms, BF16)


@pytest.mark.parametrize("kind", ["int1", "int2", "int4", "int8", "rank3", "top0.02", "int1+rank2"])
@pytest.mark.parametrize("counts", [[1, 4, 0, 2], [3], [0, 0, 1], [9, 1]], ids=str)
def test_pairs_of_several_experts(kind, counts, monkeypatch):
    """Each expert's rows get that expert's product, on one thread and on three."""
    _, made, _ = packed(kind, (80, 64), (1, 2, 3, 4, 5))
    experts = [4, 0, 3, 2][: len(counts)]
    x = normal(sum(counts), 64, dtype=torch.bfloat16)
    each = zip(x.split(counts), experts, strict=True)
    expected = torch.cat([reference.delta_matmul(own, made, e) for own, e in each])
    each = zip(x.double().abs().split(counts), experts, strict=True)
    terms = torch.cat([own @ _terms(made, e).T for own, e in each])
    alone = short.products(x, made, experts, counts)
    near(alone, expected, terms, BF16)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(tables, "THREAD_LOOKUPS", 1)
    try:
        assert torch.equal(short.products(x, made, experts, counts), alone)
    finally:
        torch.set_num_threads(before)


def test_many_experts():
    made = ints(1, (64, 64), 256)
    x = normal(256, 64, dtype=torch.bfloat16)
    found = short.products(x, made, range(256), [1] * 256)
    for expert in (0, 100, 255):
        own = x[expert : expert + 1]
        terms = own.double().abs() @ _terms(made, expert).T
        near(found[expert : expert + 1], reference.delta_matmul(own, made, expert), terms, BF16)


def test_codes_without_lookups(monkeypatch):
    """A processor without them takes torch's 4-bit kernel for 1 and 2 bits too."""
    monkeypatch.setattr(tables, "_has_lookups", lambda: False)
    for bits in (1, 2):
        assert "AVX-512" in tables.refuses(bits, 32)
        made, x = ints(bits, (32, 64), 2), normal(3, 64, dtype=torch.bfloat16)
        terms = x.double().abs() @ _terms(made, 1).T
        near(backend.delta_matmul(x, made, 1), reference.delta_matmul(x, made, 1), terms, BF16)
        assert ("four bits", 1) in made._made


@pytest.mark.parametrize(
    "delta, why", [("int4", "16 outputs"), ("drop0.7", "too many"), ("int4+int1", "16 outputs"), ("rank2", "")]
)
def test_what_has_no_short_way(delta, why):
    _, made, _ = packed(delta, (20, 32), (1,))
    said = short.refuses(made, torch.bfloat16)
    assert (why in said) if why else said == ""
    assert "not torch.float32" in short.refuses(ints(4, (16, 32), 1), torch.float32)
    assert "groups of 32" in short.refuses(ints(4, (16, 48), 1, group=24), torch.bfloat16)


def test_when_a_short_way_pays():
    """Many tokens: codes and dense selections are decoded; low rank, few entries and drawn ones never are."""

    def limits(delta: str) -> tuple[bool, ...]:
        _, made, _ = packed(delta, (16, 128), (1,))
        return tuple(short.pays(made, torch.bfloat16, tokens) for tokens in (12, 24, 64, 1000))

    assert limits("int1") == limits("top0.1") == (True, True, True, False)
    assert limits("int2") == limits("int4") == limits("int4+rank2") == (True, True, False, False)
    assert limits("int8") == (True, False, False, False)
    assert limits("rank2") == limits("drop0.9") == limits("top0.01") == (True, True, True, True)
    assert limits("2:4") == (False, False, False, False)


def test_what_is_worked_out_once(monkeypatch):
    """Codes are put in order, and columns found, at the first product and not at the next."""
    calls: list[str] = []
    for module, name in ((tables, "arrange"), (four_bits, "pack"), (scattered, "positions")):
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, plain=plain, name=name: calls.append(name) or plain(*a))
    for delta, expected in (("int1", ["arrange"]), ("int4", ["pack"]), ("top0.02", ["positions"])):
        _, made, _ = packed(delta, (16, 64), (1, 2))
        calls.clear()
        for _ in range(3):
            backend.delta_matmul(normal(2, 64, dtype=torch.bfloat16), made, 1)
        assert calls == expected


def test_columns_of_malformed_bits_are_refused():
    _, made, _ = packed("top0.3", (4, 64), (1,))
    made.positions.bits[0, 2, 0] ^= 1
    with pytest.raises(ValueError, match="row 2: bitmap"):
        backend.delta_matmul(normal(1, 64), made, 0)


# --- weights ---


@pytest.mark.parametrize("shape", [*SHAPES, (40, 64)], ids=str)
@pytest.mark.parametrize("delta", CODECS)
def test_synthesize_has_the_bits_of_the_reference(delta, shape, monkeypatch):
    _, made, _ = packed(delta, shape, (11, 5))
    for dtype in DTYPES:
        base = normal(*shape, dtype=dtype)
        base.view(-1)[:: max(1, base.numel() // 3)] = float("inf")
        base.view(-1)[-1] = float("nan")
        expected = reference.synthesize(base, reference.decode(made, 1))
        assert torch.equal(_bits(backend.synthesize(base, made, 1)), _bits(expected))
        with monkeypatch.context() as patch:  # rows in several calls, on several threads
            patch.setattr(blocks, "STEP", shape[1] * 3)
            patch.setattr(blocks, "TASK", 1)
            assert torch.equal(_bits(backend.synthesize(base, made, 1)), _bits(expected))


def _bits(values: Tensor) -> Tensor:
    """All NaN are one: which one an operation gives is the processor's choice."""
    return values.nan_to_num(nan=1e4, posinf=2e4, neginf=3e4)


def test_whole_products(monkeypatch):
    made, base = ints(4, (50, 64), 3), normal(50, 64, dtype=torch.bfloat16)
    x, experts, counts = normal(7, 64, dtype=torch.bfloat16), [2, 0], [3, 4]
    for weights in (1, 64 * 7, 1 << 20):
        monkeypatch.setattr(blocks, "WEIGHTS", weights)
        found = blocks.whole_products(x, base, made, experts, counts)
        for own, y, expert in zip(x.split(counts), found.split(counts), experts, strict=True):
            weight = reference.synthesize(base, reference.decode(made, expert)).double()
            near(y, own.double() @ weight.T, own.double().abs() @ weight.abs().T, BF16)


# --- a layer ---

HIDDEN, INNER = 64, 48


def projections(delta: str, experts: int, dtype: torch.dtype, gated: bool = True) -> list[Projection | None]:
    """gate, up, down with weights whose products with inputs of size 1 are of size 1."""
    made: list[Projection | None] = []
    for number, shape in enumerate(((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))):
        _, own, _ = packed(delta, shape, tuple(range(number, number + experts))) if delta else (None, None, None)
        scaled = own and _scaled(own, 0.05)
        made.append(Projection(normal(*shape, dtype=dtype, seed=number) / shape[1] ** 0.5, scaled))
    return made if gated else [None, *made[1:]]


def _scaled(delta, factor: float):
    for owner in (delta, getattr(delta, "first", None), getattr(delta, "then", None), getattr(delta, "values", None)):
        for name in ("scale", "left"):
            if hasattr(owner, name):
                getattr(owner, name).mul_(factor)
    if isinstance(getattr(delta, "values", None), Tensor):
        delta.values.mul_(factor)
    return delta


ROUTINGS = {
    "one token": torch.tensor([[1, 3]]),
    "no token": torch.zeros(0, 2, dtype=torch.int64),
    "61 tokens": torch.rand(61, 4, generator=torch.Generator().manual_seed(3)).topk(2).indices,
    "all on one expert": torch.full((7, 1), 2),
    "an expert without tokens": torch.tensor([[3, 0], [0, 3], [3, 0]]),
    "top-k = E": torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]]),
    "not here": torch.tensor([[4, 1], [-1, 4], [4, 99]]),
    "an expert twice": torch.tensor([[1, 1], [2, 0]]),
}


@pytest.mark.parametrize("delta", ["int8", "int4", "int1", "rank3", "top0.02", "2:4", "drop0.5+int4", "int1+rank2", ""])
@pytest.mark.parametrize("way", ["apart", "whole"])
def test_moe_forward(delta, way, monkeypatch):
    if way == "whole":
        monkeypatch.setattr(short, "_many", lambda delta: 0)
    for dtype in (torch.float32, torch.bfloat16):
        for gated in (True, False):
            made = projections(delta, 4, dtype, gated)
            for name, index in ROUTINGS.items():
                if not delta and name == "not here":
                    continue  # without deltas every number is an expert
                x, gates = normal(index.shape[0], HIDDEN, dtype=dtype), normal(*index.shape).softmax(1).to(dtype)
                for activation in ("silu", "gelu"):
                    found = backend.moe_forward(x, index, gates, *made, activation)
                    expected = reference.moe_forward(x, index, gates, *made, activation)
                    assert found.dtype == dtype and found.isfinite().all(), name
                    if found.numel():
                        # roundings to bf16 (2^-9 each) of some ten values on the way, of the largest entry
                        tolerance = FP32 if dtype == torch.float32 else 3e-2
                        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize("pairs", [1, 5, 8])
def test_a_layer_in_bundles(pairs, monkeypatch):
    made, index = projections("rank3", 4, torch.float32), ROUTINGS["61 tokens"]
    x, gates = normal(61, HIDDEN), normal(61, 2).softmax(1)
    monkeypatch.setattr(layer, "BUNDLE", pairs)
    found, expected = (b.moe_forward(x, index, gates, *made, "silu") for b in (backend, reference))
    assert (found - expected).abs().max() <= FP32 * expected.abs().max()


@pytest.mark.parametrize("experts", [1, 256])
def test_one_expert_and_many(experts):
    made = projections("rank1", experts, torch.float32)
    index = torch.arange(0, experts, 7 if experts > 1 else 1)[:, None].repeat(3, 1)
    x, gates = normal(len(index), HIDDEN), normal(len(index), 1)
    found, expected = (b.moe_forward(x, index, gates, *made, "silu") for b in (backend, reference))
    assert (found - expected).abs().max() <= FP32 * expected.abs().max()


# --- inner products, and what is refused ---


@pytest.mark.parametrize("shape", [(1, 1), (3, 61), (64, 40000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_gram(shape, dtype):
    experts = normal(*shape, dtype=dtype)
    found, expected = backend.expert_gram(experts), reference.expert_gram(experts)
    assert found.dtype == torch.float64
    # fp32 sums over blocks of 16384 columns, added in fp64: far closer than one fp32 sum, as the diagonal shows
    sizes = expected.diagonal().sqrt()
    assert ((found - expected).abs() <= 1e-6 * sizes[:, None] * sizes).all()


def test_refusals():
    x, made = normal(1, 64), ints(4, (16, 64), 1)
    assert backend.refuses("delta_matmul", x, (made,)) == ""
    assert "on the CPU, not on meta" in backend.refuses("delta_matmul", x.to("meta"), (made,))
    assert "not torch.float64" in backend.refuses("delta_matmul", x.double(), (made,))


def test_auto_takes_it(caplog):
    dispatch._said.clear()
    with caplog.at_level(logging.INFO, "ders_kernels.dispatch"):
        dispatch.delta_matmul(normal(1, 64, dtype=torch.bfloat16), ints(4, (16, 64), 1), 0)
    assert "delta_matmul on cpu: cpu" in caplog.text


def test_shared_work_covers_every_part(monkeypatch):
    from ders_kernels.cpu_ops.threads import share

    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in (0, 1, 2, 7):
                for worth in (None, 0, 2):
                    done = np.zeros(count, np.int64)

                    def task(a: int, b: int, done: np.ndarray = done) -> None:
                        done[a:b] += 1

                    share(task, count, worth)
                    assert (done == 1).all()
        with pytest.raises(ZeroDivisionError):  # from a thread, too
            share(lambda a, b: 1 // (b - a - 1) if a else None, 2)
    finally:
        torch.set_num_threads(before)
