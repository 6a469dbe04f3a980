"""A layer by Triton's kernels against the definition, in its interpreter or on a GPU (-m gpu); see test_triton.py."""

from collections.abc import Callable

import pytest
import torch
from ders_kernels import dispatch, reference
from ders_kernels.deltas import Projection
from test_packed_delta import packed
from test_triton import DTYPES, moved, took

pytest.importorskip("triton")
from ders_kernels.triton_ops import ints, pairs  # noqa: E402
from ders_kernels.triton_ops import layer as triton_layer  # noqa: E402

pytestmark = pytest.mark.usefixtures("watched")
HIDDEN, INNER = 7, 10
# Of the norm of y. fp32: the order of sums, over two products, one after the other. Else nine roundings to half a unit, one after another or
# side by side: base products, h, their sum, weights or operands, y; they are independent, so about three add up.
TOLERANCE = {torch.float32: 8e-6, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}


def layer(
    codec: str | None,
    experts: int,
    dtype: torch.dtype = torch.float32,
    gated: bool = True,
    sizes: tuple[int, int] = (HIDDEN, INNER),
    **other: str | None,
) -> list[Projection | None]:
    """gate, up, down; `other` names codecs of single projections. Groups of integers are 8."""
    made, (hidden, inner) = [], sizes
    for number, name in enumerate(("gate", "up", "down")):
        shape = (hidden, inner) if name == "down" else (inner, hidden)
        base = torch.randn(shape, generator=torch.Generator().manual_seed(number)) / shape[1] ** 0.5
        own = other.get(name, codec)
        delta = None if own is None else packed(own, shape, tuple(range(number, number + experts)), 8)[1]
        made.append(Projection(base.to(dtype), delta))
    return made if gated else [None, *made[1:]]


def routing(tokens: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(tokens)
    scores, index = torch.rand(tokens, experts, generator=random).topk(k)
    return index, scores


def assert_layer(
    layer: list[Projection | None],
    index: torch.Tensor,
    gates: torch.Tensor,
    device: str,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
) -> None:
    x = torch.randn(index.shape[0], layer[1].base.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    given = (t.to(device) for t in (x, index, gates))
    y = dispatch.moe_forward(*given, *(moved(p, device) for p in layer), activation=activation, backend="triton")
    expected = reference.moe_forward(x, index, gates, *layer, activation)
    assert y.shape == x.shape and y.dtype == dtype and y.device.type == device
    distance = (y.cpu().double() - expected).norm() / expected.norm()
    assert distance < TOLERANCE[dtype], distance  # not so if it is NaN


SOME = pytest.mark.parametrize("codec", ["int4", "drop0.7", "2:4+int3", "ternary0.1", "rank3", "int1+rank2"])


@DTYPES
@pytest.mark.parametrize("codec", ["int4", "drop0.7", "ternary0.1", "int1+rank2"])
def test_layer(codec, dtype, device):
    assert_layer(layer(codec, 4, dtype), *routing(5, 4, 2), device, dtype)


@SOME
@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 1, 1), (1, 4, 2), (5, 4, 4)])
def test_tokens_and_experts(codec, tokens, experts, k, device):
    assert_layer(layer(codec, experts), *routing(tokens, experts, k), device)


@pytest.mark.parametrize("codec", ["int4", "rank3"])
def test_more_pairs_than_one_program_sorts(codec, device):
    """140 of them, and an expert with more than one block; 128 are the most."""
    assert_layer(layer(codec, 4), *routing(70, 4, 2), device)


@DTYPES
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_one_token_of_each_expert(codec, dtype, device, monkeypatch):
    """Integers lane by lane, of copies of x in planes: a token's pairs share one."""
    launches = took(monkeypatch, ints, "int_token_product")
    sizes = (32, 64)
    made = [
        Projection(p.base, packed(codec, tuple(p.base.shape), range(5), 32)[1])
        for p in layer(None, 5, dtype, sizes=sizes)
    ]
    assert_layer(made, *routing(1, 5, 3), device, dtype)
    assert len(launches) == 3


@pytest.mark.parametrize("few", [128, 0])
@pytest.mark.parametrize("tokens", [1, 5])
def test_256_experts(tokens, few, device, monkeypatch):
    monkeypatch.setattr(pairs, "FEW", few)
    assert_layer(layer("int4", 256), *routing(tokens, 256, 2), device)


def test_every_one_of_256_experts(device):
    assert_layer(layer("2:4", 256, gated=False, sizes=(8, 4)), *routing(1, 256, 256), device)


@pytest.mark.parametrize("codec", ["int4", "drop0.7", "top0.02", "rank3"])
def test_one_expert_has_all_tokens(codec, device):
    for expert in (0, 3):
        gates = torch.rand(6, 1)
        assert_layer(layer(codec, 4), torch.full((6, 1), expert), gates, device)


@pytest.mark.parametrize("few", [128, 0])
@pytest.mark.parametrize("codec", ["int4", "drop0.7", "rank3"])
def test_indices_outside(codec, few, device, monkeypatch):
    """Such pairs add nothing, and a token that has no other is 0."""
    monkeypatch.setattr(pairs, "FEW", few)
    tokens = 5
    index, gates = routing(tokens, 4, 2)
    index[0], index[1, 0], index[2, 1], index[3] = torch.tensor([-1, 4]), -1, 2**31 - 1, torch.tensor([3, 3])
    assert_layer(layer(codec, 4), index, gates, device)
    x = torch.ones(tokens, HIDDEN, device=device)
    made = [moved(p, device) for p in layer(codec, 4)]
    assert not dispatch.moe_forward(x, index.to(device), gates.to(device), *made, backend="triton")[0].any()


def test_no_expert_at_all(device):
    made = [moved(p, device) for p in layer("int4", 4)]
    index, gates = torch.full((3, 2), 4, device=device), torch.ones(3, 2, device=device)
    y = dispatch.moe_forward(torch.ones(3, HIDDEN, device=device), index, gates, *made, backend="triton")
    assert y.shape == (3, HIDDEN) and not y.any()


@pytest.mark.parametrize("codec", ["int4", "drop0.7", "top0.02", "rank3", None])
def test_no_tokens(codec, device):
    made = [moved(p, device) for p in layer(codec, 4)]
    index, gates = torch.zeros(0, 2, dtype=torch.int64, device=device), torch.ones(0, 2, device=device)
    y = dispatch.moe_forward(torch.ones(0, HIDDEN, device=device), index, gates, *made, backend="triton")
    assert y.shape == (0, HIDDEN)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole experts", "apart"])
def test_activations(activation, gated, whole, device, monkeypatch):
    monkeypatch.setattr(triton_layer, "many", lambda delta: 0 if whole else 100)
    assert_layer(layer("int4", 4, gated=gated), *routing(5, 4, 2), device, activation=activation)


@DTYPES
@pytest.mark.parametrize("codec", ["int4", "rank3", None])
def test_without_a_gate(codec, dtype, device):
    assert_layer(layer(codec, 4, dtype, gated=False), *routing(5, 4, 2), device, dtype)


@pytest.mark.parametrize("whole", [True, False], ids=["whole experts", "apart"])
@pytest.mark.parametrize(
    "codecs",
    [
        {"gate": None},
        {"up": None},
        {"down": None},
        {"gate": None, "up": None},
        {"up": None, "down": None},
        {"gate": "int1+rank2", "down": "drop0.7"},
    ],
    ids=str,
)
def test_projections_of_their_own(codecs, whole, device, monkeypatch):
    """Some have no delta; some have more parts than others."""
    monkeypatch.setattr(triton_layer, "many", lambda delta: 0 if whole else 100)
    index, gates = routing(5, 4, 2)
    index[0, 0] = -1
    assert_layer(layer("int4", 4, **codecs), index, gates, device)


@DTYPES
def test_no_deltas(dtype, device):
    """Every expert is the base: any number but a negative one is an expert's."""
    index, gates = routing(5, 4, 2)
    index[0, 0], index[1, 1] = -1, 1000
    assert_layer(layer(None, 4, dtype), index, gates, device, dtype)


@pytest.mark.parametrize(
    ("codec", "tokens", "experts", "whole"),
    [("2:4", 70, 1, True), ("2:4", 128, 2, True), ("2:4", 127, 2, False), ("rank3", 70, 1, False)]
    + [("int4", 128, 1, False), ("int4", 256, 1, True), ("int1+rank2", 256, 1, True)],
)
def test_many_tokens_take_whole_experts(codec, tokens, experts, whole, device, monkeypatch):
    """From 64 tokens of an expert on, of integers 256, of low rank never."""
    synthesized = calls(monkeypatch)
    assert_layer(layer(codec, experts), *routing(tokens, experts, 1), device)
    assert len(synthesized) == 3 * experts * whole


@DTYPES
@pytest.mark.parametrize("codec", ["drop0.7", "2:4+int3", "ternary0.1", "int1+rank2"])
def test_whole_experts(codec, dtype, device, monkeypatch):
    """Those that have tokens are synthesised, others not."""
    monkeypatch.setattr(triton_layer, "many", lambda delta: 1)
    synthesized = calls(monkeypatch)
    index, gates = routing(9, 2, 2)
    index[:3, 0], index[4] = 7, torch.tensor([-1, 8])
    assert_layer(layer(codec, 4, dtype), index, gates, device, dtype)
    assert sorted(synthesized) == [0, 0, 0, 1, 1, 1]


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Experts that are synthesised from now on."""
    made, right = [], triton_layer.synthesize
    record: Callable[..., torch.Tensor] = lambda base, delta, expert: made.append(expert) or right(base, delta, expert)  # noqa: E731
    monkeypatch.setattr(triton_layer, "synthesize", record)
    return made


@pytest.mark.parametrize("codec", [None, "rank1"])
@pytest.mark.parametrize("gated", [True, False])
def test_wide_layer(codec, gated, device):
    """The steps between products take 1024 columns at a time."""
    assert_layer(layer(codec, 2, gated=gated, sizes=(1030, 1030)), *routing(2, 2, 2), device)


@pytest.mark.parametrize("tokens", [1, 5])
def test_bases_and_gates_of_other_dtypes(tokens, device):
    """bf16 x, fp32 gates; fp32 x and bf16 bases, which are exact in fp32."""
    index, gates = routing(tokens, 4, 2)
    assert_layer(layer("int4", 4, torch.bfloat16), index, gates, device, torch.float32)
    assert_layer(layer("int4", 4, torch.bfloat16), index, gates.bfloat16(), device, torch.float32)
    assert_layer(layer("int4", 4, torch.bfloat16), index, gates, device, torch.bfloat16)


def test_strides(device):
    """x, index and gates that are no rows one after another."""
    index, gates = routing(5, 4, 2)
    index[1, 0] = -1
    made, x = layer("int4", 4), torch.randn(HIDDEN, 5)
    y = dispatch.moe_forward(
        x.to(device).T, index.T.contiguous().to(device).T, gates.T.contiguous().to(device).T,
        *(moved(p, device) for p in made), backend="triton",
    )  # fmt: skip
    expected = reference.moe_forward(x.T, index, gates, *made, "silu")
    assert (y.cpu().double() - expected).norm() < TOLERANCE[torch.float32] * expected.norm()
