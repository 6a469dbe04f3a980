"""The torch modules: every codec against a plain loop over synthesised weights; gradients against autograd through them.

Tolerances: `FP32` covers sums of a few hundred fp32 products in another order, `BF16` a few roundings to 8 bits (2^-8
each) on the way; both of the largest entry.
"""

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.utils.checkpoint
from command import done
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import tables
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import linear, silu
from toy import make

from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.codecs import parse_codec
from ders_cli.codecs.base import DeltaCodec
from ders_cli.codecs.rank import RankCodec
from ders_cli.codecs.sparse import SparseCodec
from ders_cli.errors import DersError
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.runtime.choice import choose
from ders_cli.runtime.dtypes import TORCH, bits_of, from_bits
from ders_cli.runtime.experts import DersExperts
from ders_cli.runtime.group import RuntimeGroup, runtime_groups, split_name
from ders_cli.runtime.lookups import Lookups
from ders_cli.runtime.packed import Packed
from ders_cli.runtime.projection import WEIGHTS, DersProjection, short_form
from ders_cli.source import DersSource, stored_parts

FP32, BF16 = 1e-5, 3e-2
HIDDEN, INNER = 64, 48
CODECS = (
    "exact int8 int4 int3 int2 int1 drop0.9 drop0.5 sparse0.99 sparse0.5 top0.1 2:4 1:16 ternary0.02 rank4 none "
    "drop0.5+int4 int2+rank2"
).split()


def group_of(
    codec: str | DeltaCodec,
    shape: tuple[int, int],
    experts: tuple[int, ...],
    projection: str,
    dtype: str = "BF16",
    where: str = "model.layers.0.mlp.experts",
) -> tuple[RuntimeGroup, dict[str, Tensor]]:
    """A group of random experts, encoded: the group and its tensors as on disk, by the module's names."""
    codec = parse_codec(codec, 32) if isinstance(codec, str) else codec
    name = f"{where}.{projection}_proj"
    random = torch.Generator().manual_seed(sum(map(ord, name)) + shape[0])
    stored = TORCH[dtype]
    # weights whose products with inputs of size 1 are of size 1
    base = (torch.randn(shape, generator=random) / shape[1] ** 0.5).to(stored)
    keys = tuple(make_key(0, name, str(e)) for e in experts)
    members = tuple((str(e), MatrixView("w", shape, 0, shape[1], 1)) for e in experts)
    specs = stored_parts(ExpertGroup(name, 0, projection, dtype, members), codec)
    each = []
    for key in keys:
        delta = torch.randn(shape, generator=random) / shape[1] ** 0.5 / 2
        expert = (base.float() + delta).to(stored)
        each.append(encoded(codec, bits_of(expert), bits_of(base), dtype, key))
    tensors = {"base": base}
    prefix = len(name) + 1
    if codec.lossless:
        at = np.cumsum([0] + [len(parts["stream"]) for parts in each])
        tensors["delta.extents"] = torch.tensor([[[a, b]] for a, b in zip(at, at[1:], strict=False)])
        tensors["delta.stream"] = torch.from_numpy(np.concatenate([parts["stream"] for parts in each]))
        specs[f"{name}.delta.stream"] = TensorSpec((int(at[-1]),), "U8")
    else:
        for part, spec in codec.spec(shape).items():
            stack = np.stack([parts[part] for parts in each])
            tensors[f"delta.{part}"] = from_bits(stack, TORCH[spec.dtype])
    parts = {full[prefix:]: spec for full, spec in specs.items()}
    return RuntimeGroup(name, projection, shape, dtype, codec, keys, tuple(experts), parts), tensors


def encoded(codec: DeltaCodec, expert: np.ndarray, base: np.ndarray, dtype: str, key: int) -> dict[str, np.ndarray]:
    return codec.encode_expert(expert, base, dtype, key, 0)


def filled(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The module with the tensors of the disk; strict, so the names are those of the disk."""
    module.load_state_dict(tensors)
    return module


def projection_of(codec, shape=(HIDDEN, INNER), experts=3, stored="BF16", dtype=None) -> DersProjection:
    group, tensors = group_of(codec, shape, tuple(range(experts)), "up", stored)
    return filled(DersProjection(group, dtype=dtype), tensors)


def activate(gate: Tensor | None, up: Tensor) -> Tensor:
    return silu(up) if gate is None else silu(gate) * up


def experts_of(
    codec, experts=4, *, hidden=HIDDEN, inner=INNER, gated=True, stored="BF16", dtype=None, slices=0, biases=None
) -> DersExperts:
    """An experts module; with `slices`, experts are dealt to them in turn."""
    groups, tensors = [], {}
    for s in range(max(1, slices)):
        name = f"slice{s}." if slices else ""
        numbers = tuple(range(s, experts, slices) if slices else range(experts))
        where = f"model.layers.0.mlp.experts.{name}".rstrip(".")
        for projection in ("gate", "up", "down") if gated else ("up", "down"):
            shape = (hidden, inner) if projection == "down" else (inner, hidden)
            group, own = group_of(codec, shape, numbers, projection, stored, where)
            groups.append(group)
            tensors |= {f"{name}{projection}_proj.{part}": tensor for part, tensor in own.items()}
    return filled(DersExperts(groups, activate, biases, dtype=dtype), tensors).eval()


def owners(module: DersExperts) -> list[nn.Module]:
    return [module.get_submodule(name) for name in module._slices]


def reference(module: DersExperts, x: Tensor, index: Tensor, weights: Tensor, synthesised=None) -> Tensor:
    """The stock loop, in fp32, over weights W = synthesised(projection, member) fp32 [out, in]."""
    weight = synthesised or (lambda projection, member: projection.weight(member).float())
    out = torch.zeros(x.shape)
    for owner in owners(module):
        for token in range(x.shape[0]):
            for slot in range(index.shape[1]):
                expert = int(index[token, slot])
                if expert not in owner.up_proj.group.experts:
                    continue
                member = owner.up_proj.group.experts.index(expert)
                row, ffn = x[token : token + 1].float(), {}
                for projection in ("gate", "up"):
                    if (p := getattr(owner, f"{projection}_proj")) is not None:
                        ffn[projection] = linear(row, weight(p, member), bias_of(module, projection, expert))
                hidden = activate(ffn.get("gate"), ffn["up"])
                y = linear(hidden, weight(owner.down_proj, member), bias_of(module, "down", expert))
                out = out.index_add(0, torch.tensor([token]), weights[token, slot].float() * y)
    return out


def bias_of(module: DersExperts, projection: str, expert: int) -> Tensor | None:
    return module.biases(projection, expert).float() if module.biases else None


def routing(tokens: int, k: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Different experts for every token, and gates that sum to 1."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=random).softmax(1).topk(k, dim=1)
    return scores.indices, scores.values / scores.values.sum(1, keepdim=True)


def inputs(tokens: int, dtype=torch.float32, hidden: int = HIDDEN) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Equal within the tolerance of the largest entry: each is a sum whose terms may be as large."""
    a, b = a.detach().float(), b.detach().float()
    assert a.shape == b.shape
    assert a.isfinite().all()
    if b.numel():
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- one group ---


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
def test_weight_is_what_restore_writes(codec: str, stored: str) -> None:
    made = projection_of(codec, (33, 40), stored=stored)
    for member, key in enumerate(made.group.keys):
        parts = {n: bits_of(t if n == "stream" else t[member]) for n, t in made.delta.tensors().items()}
        if codec == "exact":
            begin, end = made.delta.extents[member, 0].tolist()
            parts = {"stream": parts["stream"][begin:end]}
        expected = made.group.codec.decode_expert(parts, bits_of(made.base), stored, key, 0)
        assert made.weight(member).dtype == TORCH[stored]
        assert np.array_equal(bits_of(made.weight(member)), expected)


def test_weight_of_many_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {codec: projection_of(codec, (50, 24)).weight(1) for codec in CODECS}
    monkeypatch.setattr("ders_cli.runtime.synthesis.BLOCK_WEIGHTS", 24 * 7)
    for codec in CODECS:
        assert torch.equal(projection_of(codec, (50, 24)).weight(1), expected[codec]), codec


@pytest.mark.parametrize("codec", CODECS)
def test_fp32_in_memory_rounds_nothing(codec: str) -> None:
    stored, wide = projection_of(codec), projection_of(codec, dtype=torch.float32)
    assert wide.base.dtype == wide.weight(0).dtype == torch.float32
    # decoded by the same kernel but for rank, whose fp32 product BLAS sums in another order: one step of bf16, 2^-8, at most
    apart = (wide.weight(1).bfloat16().float() - stored.weight(1).float()).abs()
    assert (apart <= (2.0**-7 * stored.weight(1).float().abs() if codec.startswith("rank") else 0)).all()
    if codec not in ("exact", "none"):
        assert not torch.equal(wide.weight(1).bfloat16().float(), wide.weight(1))


@pytest.mark.parametrize("codec", ["rank4", "drop0.9", "drop0.5", "sparse0.99", "top0.1"])
def test_what_fp32_training_adds_is_in_the_weight(codec: str) -> None:
    """Parts stored in BF16, trained in fp32: steps below a bf16's last bit count."""
    made = projection_of(codec, dtype=torch.float32)
    trained = [p for name, p in made.named_parameters() if p.requires_grad and name != "base"]
    before, x = made.weight(1), inputs(3, hidden=INNER)
    with torch.no_grad():
        for p in trained:
            p.mul_(1 + 2**-12)
        expected = (before - made.base) * (1 + 2**-12) ** len(trained)
        assert not torch.equal(made.weight(1), before)
        # both differ by some ulps of the weights, of which none is above 8
        assert (made.weight(1) - made.base - expected).abs().max() < 4e-6 < (before - made.base - expected).abs().max()
        close(made.whole_product(x, 1), x @ (made.base + expected).T, FP32)
        close(made._dense_product(x, None, 1, None), x @ expected.T, FP32)


@pytest.mark.parametrize("codec", [RankCodec(4, "F32"), SparseCodec(0.9, "F32"), SparseCodec(0.5, "F32")])
def test_parts_wider_than_the_base(codec: DeltaCodec) -> None:
    """As they are stored after training in fp32 on a bf16 base."""
    made = projection_of(codec).eval()
    assert made.base.dtype == torch.bfloat16 != next(made.delta.parameters()).dtype
    wide, x = projection_of(codec, dtype=torch.float32), inputs(3, torch.bfloat16, INNER)
    assert torch.equal(made.weight(1), wide.weight(1).bfloat16())
    for found in (made.delta_product(x, 1), made.whole_product(x, 1) - made.base_product(x)):
        assert found.dtype == torch.bfloat16
        assert (found - x.float() @ (wide.weight(1) - wide.base).T).abs().max() < BF16 * made.whole_product(x, 1).max()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(48, 64), (33, 40), (16, 96), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_product(codec: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    made = projection_of(codec, shape, dtype=dtype).eval()
    wide = projection_of(codec, shape, dtype=torch.float32)
    tolerance = FP32 if dtype == torch.float32 else BF16
    for tokens in (1, 5):
        x = inputs(tokens, dtype, shape[1])
        for member in (0, 2):
            delta = wide.weight(member) - wide.base.detach()
            expected, largest = x.float() @ delta.T, (x.float().abs() @ delta.abs().T).max()
            with torch.no_grad():
                found = made.delta_product(x, member)
            assert found.dtype == dtype
            for each in (found, made.delta_product(x, member)):
                assert (each - expected).abs().max() <= tolerance * largest


# --- a layer's experts ---


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(codec: str, dtype: torch.dtype) -> None:
    module = experts_of(codec, 5, dtype=dtype)
    tolerance = FP32 if dtype == torch.float32 else BF16
    for tokens, k in ((1, 1), (1, 5), (3, 2), (64, 2)):
        x, (index, weights) = inputs(tokens, dtype), routing(tokens, k, 5)
        expected = reference(module, x, index, weights)
        for module.way in ("apart", "whole", "auto"):
            with torch.no_grad():
                found = module(x, index, weights.to(dtype))
            assert found.dtype == dtype
            close(found, expected, tolerance)
            close(module(x, index, weights.to(dtype)), expected, tolerance)  # with a gradient


SHORT = ("int4", "rank4", "drop0.9", "none")  # one codec for each form, and none


@pytest.mark.parametrize("codec", [*SHORT, "exact", "int2+rank2"])
@pytest.mark.parametrize("way", ["apart", "whole"])
def test_awkward_routings(codec: str, way: str) -> None:
    module = experts_of(codec, 4, dtype=torch.float32)
    module.way = way
    cases = {
        "no token": torch.zeros(0, 2, dtype=torch.int64),
        "all on one expert": torch.full((7, 1), 2),
        "experts without tokens": torch.tensor([[3, 0], [0, 3], [3, 0]]),
        "top-k = E": torch.tensor([[3, 0, 1, 2], [0, 1, 2, 3]]),
        "one token": torch.tensor([[1, 3]]),
        "an expert twice, and as many pairs as tokens": torch.tensor([[1, 1], [2, 0]]),
        "not here": torch.tensor([[4, 1], [0, 4], [4, 4]]),
    }
    for name, index in cases.items():
        x = inputs(index.shape[0])
        weights = torch.rand(index.shape, generator=torch.Generator().manual_seed(1))
        found = module(x, index, weights)
        assert found.shape == x.shape, name
        close(found, reference(module, x, index, weights), FP32)


@pytest.mark.parametrize("pairs", [1, 5, 8])
def test_experts_in_several_bundles(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts_of("int4", 5, dtype=torch.float32)
    x, (index, weights) = inputs(7), routing(7, 2, 5)
    for module.way in ("apart", "whole"):
        whole = module(x, index, weights)
        with monkeypatch.context() as patch:
            patch.setattr("ders_cli.runtime.experts.BUNDLE_PAIRS", pairs)
            close(module(x, index, weights), whole, FP32)
            with torch.no_grad():
                close(module(x, index, weights), whole, FP32)


@pytest.mark.parametrize("codec", SHORT)
def test_one_expert(codec: str) -> None:
    module = experts_of(codec, 1, dtype=torch.float32)
    x, index, weights = inputs(5), torch.zeros(5, 1, dtype=torch.int64), torch.rand(5, 1)
    close(module(x, index, weights), reference(module, x, index, weights), FP32)


@pytest.mark.parametrize("way", ["apart", "whole", "auto"])
def test_no_gate_biases_and_odd_sizes(way: str) -> None:
    values = {("gate", e): torch.randn(61) for e in range(3)} | {("up", e): torch.randn(61) for e in range(3)}
    values |= {("down", e): torch.randn(37) for e in range(3)}
    for codec in ("int4", "rank4", "top0.1", "none", "exact"):
        for gated in (True, False):
            module = experts_of(codec, 3, hidden=37, inner=61, gated=gated, dtype=torch.float32)
            module.biases, module.way = lambda projection, expert: values[projection, expert], way
            assert (module.gate_proj is None) == (not gated)
            x, (index, weights) = inputs(6, hidden=37), routing(6, 2, 3)
            close(module(x, index, weights), reference(module, x, index, weights), FP32)


@pytest.mark.parametrize("way", ["apart", "whole"])
def test_slices(way: str) -> None:
    """Three slices of two experts each: each slice has its own base."""
    module = experts_of("int4", 6, slices=3, dtype=torch.float32)
    module.way = way
    assert "slice2.down_proj.delta.codes" in module.state_dict()
    for tokens, k in ((1, 1), (9, 2), (4, 6)):
        x, (index, weights) = inputs(tokens), routing(tokens, k, 6)
        close(module(x, index, weights), reference(module, x, index, weights), FP32)


@pytest.mark.parametrize("codec", [*SHORT, "sparse0.99", "ternary0.02"])
def test_one_base_product_for_a_token(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate, up and down: tokens rows each, whatever k; a slice only for tokens that use it."""
    rows: list[int] = []
    plain = DersProjection.base_product
    monkeypatch.setattr(DersProjection, "base_product", lambda self, x: rows.append(len(x)) or plain(self, x))
    module = experts_of(codec, 6)
    module.way = "apart"
    for tokens, k in ((1, 1), (1, 6), (7, 3)):
        rows.clear()
        index, weights = routing(tokens, k, 6)
        with torch.no_grad():
            module(inputs(tokens, torch.bfloat16), index, weights)
        assert rows == [tokens] * 3
    module = experts_of(codec, 6, slices=3)
    module.way = "apart"
    rows.clear()
    with torch.no_grad():  # token 0 takes slice 0 twice, token 1 slices 0 and 1
        module(inputs(2, torch.bfloat16), torch.tensor([[0, 3], [3, 1]]), torch.ones(2, 2))
    assert rows == [2] * 3 + [1] * 3


def test_a_wrong_projection_is_refused() -> None:
    groups = [group_of("int4", (8, 8), (0, 1), p)[0] for p in ("gate", "up", "down")]
    with pytest.raises(DersError, match="model.layers.0.mlp.experts: .*down is missing"):
        DersExperts(groups[:2], activate)
    other = group_of("int4", (8, 8), (0, 1, 2), "down")[0]
    with pytest.raises(DersError, match="different experts"):
        DersExperts([*groups[:2], other], activate)


# --- which way, and what is kept ---


def test_choice() -> None:
    shape = (5632, 2048)

    def way(
        codec: str, tokens: float, active: int = 8, kept: bool = True, gradient: bool = False, runs: bool = True
    ) -> str:
        made = projection_of(codec, (16, 32)) if runs else None
        return choose(parse_codec(codec, 32), made and made.form, shape, tokens, active, kept, gradient)

    assert way("int4", 1) == way("int1", 8) == way("int4", 16, kept=False) == way("int8", 1) == "apart"
    assert way("int4", 16) == way("int4", 32, kept=False) == way("int8", 4) == way("int8", 1, active=2) == "whole"
    assert way("exact", 1) == way("drop0.9+int4", 1) == "whole"
    assert way("int4", 1, active=1) == way("drop0.99", 1, active=1) == "whole"  # base and delta are more than one W
    assert way("int4", 1, active=1, kept=False) == way("rank16", 1, active=1) == way("int8", 1, 2, False) == "apart"
    assert way("int4", 1, runs=False) == "whole"
    shape = (1536, 576)  # calls cost more than reading: kept weights, if they are kept
    assert way("int4", 1) == way("rank16", 1) == way("drop0.99", 1) == "whole"
    assert way("rank16", 1, kept=False) == way("rank16", 1, gradient=True) == way("int4", 1, kept=False) == "apart"
    shape = (5632, 2048)
    assert way("rank16", 1) == way("rank16", 256) == way("rank16", 256, gradient=True) == "apart"
    assert way("drop0.99", 256) == way("sparse0.9999", 256, gradient=True) == way("ternary0.02", 256) == "apart"
    assert way("drop0.9", 1) == "apart"
    assert way("drop0.9", 32) == way("drop0.9", 1, gradient=True) == "whole"


@pytest.fixture
def cache():
    """The cache of all layers, empty before and with its limit restored after."""
    limit = WEIGHTS.limit
    WEIGHTS.limit = 0
    WEIGHTS.limit = limit
    yield WEIGHTS
    WEIGHTS.limit = limit


def test_cache_keeps_its_bound_and_the_latest(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    plain = DersProjection.weight
    monkeypatch.setattr(DersProjection, "weight", lambda self, m: made.append((id(self), m)) or plain(self, m))
    first, second = experts_of("top0.1", 4), experts_of("top0.1", 4)
    assert second.cache_bytes == first.cache_bytes == cache.limit
    one = HIDDEN * INNER * 2  # bytes of a weight in bf16
    first.cache_bytes = 5 * one
    assert second.cache_bytes == 5 * one
    first.way = second.way = "whole"
    x, weights = inputs(1, torch.bfloat16), torch.ones(1, 1)
    with torch.no_grad():
        for module, expert, new in (
            (first, 0, 3),
            (first, 0, 0),
            (second, 1, 3),  # the oldest of the first goes: gate of expert 0
            (second, 1, 0),
            (first, 0, 3),  # and so do up and down, as gate and up come back
        ):
            made.clear()
            expected = reference(module, x, torch.tensor([[expert]]), weights)
            made.clear()
            close(module(x, torch.tensor([[expert]]), weights), expected, BF16)
            assert len(made) == new, (expert, made)
            assert cache.held <= 5 * one
        assert cache.held == 5 * one
        first.cache_bytes = one
        assert cache.held == one
        first.cache_bytes = one - 1  # none fits
        module(x, torch.tensor([[2]]), weights)
        assert cache.held == 0


def test_cache_drops_the_least_recently_used(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = DersProjection.weight
    monkeypatch.setattr(DersProjection, "weight", lambda self, m: made.append(m) or plain(self, m))
    projection = projection_of("int4").eval()
    cache.limit = 2 * HIDDEN * INNER * 2
    for member in (0, 1, 0, 2, 0, 1):  # 2 drives out 1, then 1 drives out 2
        projection.kept_weight(member)
    assert made == [0, 1, 2, 1]


def test_whole_where_all_weights_have_room(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 32 tokens an expert synthesised weights win if all can be kept; else int4's are made in blocks, and none is kept."""
    made: list[int] = []
    plain = DersProjection.weight
    monkeypatch.setattr(DersProjection, "weight", lambda self, m: made.append(m) or plain(self, m))
    x, (index, weights) = inputs(64, torch.bfloat16), routing(64, 2, 4)
    for room, expected in ((12, 12), (11, 0)):
        made.clear()
        module = experts_of("int4", 4)
        cache.limit = room * HIDDEN * INNER * 2
        with torch.no_grad():
            module(x, index, weights)
        assert len(made) == expected
        del module


@pytest.mark.parametrize("codec", ["int8", "int4", "int1", "int2+rank2", "top0.3"])
@pytest.mark.parametrize("way", ["apart", "whole", "auto"])
def test_without_room(codec: str, way: str, cache) -> None:
    """What isn't kept is made for each call, integers block by block: the same layer."""
    module = experts_of(codec, 5)
    cache.limit, module.way = 0, way
    for tokens, k in ((1, 1), (1, 5), (70, 2)):
        x, (index, weights) = inputs(tokens, torch.bfloat16), routing(tokens, k, 5)
        with torch.no_grad():
            close(module(x, index, weights), reference(module, x, index, weights), BF16)
    assert cache.held == 0


def test_forms_of_integers() -> None:
    """Lookups for 1 and 2 bits where the processor has them, torch's 4-bit kernel for the others."""
    forms = {c: projection_of(c, (64, 64)).form for c in ("int1", "int2", "int3", "int4", "int8")}
    few = Packed if tables.refuses(1, 32) else Lookups
    assert [type(form) for form in forms.values()] == [few, few, Packed, Packed, Packed]
    assert short_form(projection_of("int4", (33, 40)).group) is None


def test_training_keeps_columns_and_frees_packed_codes() -> None:
    """Trainers call train() at each step; columns cost more than the step."""
    for codec, kept in (("int4", False), ("drop0.9", True)):
        module = experts_of(codec, 2)
        module.way = "apart"
        with torch.no_grad():
            module(inputs(2, torch.bfloat16), *routing(2, 2, 2))
        assert module.up_proj._made
        module.train()
        assert bool(module.up_proj._made) == kept


def test_cache_is_freed_by_train_and_with_the_module(cache) -> None:
    module = experts_of("exact", 4)
    x, (index, weights) = inputs(3, torch.bfloat16), routing(3, 2, 4)
    expected = module(x, index, weights)
    assert cache.held > 0
    module.train()
    assert cache.held == 0
    assert torch.equal(module(x, index, weights), expected)
    assert cache.held == 0
    module.eval()
    module(x, index, weights)
    held = cache.held
    twin = copy.deepcopy(module)
    twin(x, index, weights)
    assert cache.held == 2 * held
    del twin
    assert cache.held == held
    del module
    assert cache.held == 0


@pytest.mark.parametrize("codec", CODECS[1:])  # exact deltas fit one base only
def test_changed_parameters_are_seen(codec: str, cache) -> None:
    """Whatever is kept (weights, columns, packed codes) is made again for other parameters."""
    module = experts_of(codec, 3)
    other = experts_of(codec, 3, inner=INNER)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(p.roll(1, 0) if p.is_floating_point() else p)
    x, (index, weights) = inputs(2, torch.bfloat16), routing(2, 2, 3)
    for way in ("apart", "whole"):
        changed = copy.deepcopy(module)
        changed.way = other.way = way
        with torch.no_grad():
            before = changed(x, index, weights)
            changed.load_state_dict(other.state_dict())
            assert torch.equal(changed(x, index, weights), other(x, index, weights))
            assert not torch.equal(changed(x, index, weights), before)


def test_codes_that_change_are_seen() -> None:
    module = experts_of("int4", 2)
    x, (index, weights) = inputs(2, torch.bfloat16), routing(2, 2, 2)
    with torch.no_grad():
        for module.way in ("apart", "whole"):
            before = module(x, index, weights)
            module.up_proj.delta.codes.bitwise_xor_(255)
            assert not torch.equal(module(x, index, weights), before)
            close(module(x, index, weights), reference(module, x, index, weights), BF16)


# --- training ---

TRAINED = {"rank4": {"left", "right"}, "drop0.9": {"values"}, "drop0.5": {"values"}, "sparse0.99": {"values"}}
TRAINED |= {"top0.1": {"values"}, "2:4": {"values"}, "1:16": {"values"}, "sparse0.5": {"values"}}


def differentiable_weight(projection: DersProjection, member: int) -> Tensor:
    """B + D, built of the parameters by plain torch; D of what doesn't train is a constant."""
    base, form = projection.base.float(), projection.form
    names = form.trainable if form else frozenset()
    if names == {"left", "right"}:
        return base + projection.delta.left[member].float() @ projection.delta.right[member].float()
    constant = projection.weight(member).float() - projection.base.detach().float()
    if not names:
        return base + constant
    # values are in row-major order of their entries; where these are, a delta of ones says
    ones = copy.deepcopy(projection)
    ones.delta.values.data.fill_(1)
    at = (ones.weight(member) - base.detach()).reshape(-1).nonzero()[:, 0]
    values = projection.delta.values[member].reshape(-1).float()
    return base + torch.zeros(constant.numel()).index_put((at,), values[: at.numel()]).reshape(constant.shape)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("way", ["apart", "whole", "auto"])
def test_gradients(codec: str, way: str) -> None:
    module = experts_of(codec, 4, dtype=torch.float32).train()
    module.way = way
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    parts = TRAINED.get(codec, set())
    bases = set() if codec == "exact" else {f"{p}_proj.base" for p in ("gate", "up", "down")}
    assert trained == bases | {f"{p}_proj.delta.{part}" for p in ("gate", "up", "down") for part in parts}
    x, (index, weights) = inputs(6).requires_grad_(), routing(6, 2, 4)
    weights.requires_grad_()
    wanted = [x, weights, *(p for p in module.parameters() if p.requires_grad)]
    direction = torch.randn(6, HIDDEN)
    found = torch.autograd.grad((module(x, index, weights) * direction).sum(), wanted)
    loop = reference(module, x, index, weights, differentiable_weight)
    expected = torch.autograd.grad((loop * direction).sum(), wanted)
    for mine, true in zip(found, expected, strict=True):
        close(mine, true, 1e-4)  # sums over tokens of products of three projections: ten times FP32


@pytest.mark.parametrize("codec", ["rank4", "sparse0.99", "drop0.5", "int4"])
def test_gradients_in_bf16(codec: str) -> None:
    module, wide = experts_of(codec, 3).train(), experts_of(codec, 3, dtype=torch.float32).train()
    index, weights = routing(5, 2, 3)
    for m in (module, wide):
        m(inputs(5, m.up_proj.base.dtype), index, weights).float().square().sum().backward()
    for mine, true in zip(module.parameters(), wide.parameters(), strict=True):
        assert (mine.grad is None) == (true.grad is None)
        if mine.grad is not None:
            assert mine.grad.dtype == torch.bfloat16
            # a few bf16 roundings, of a gradient's largest entry
            assert (mine.grad - true.grad).abs().max() < BF16 * true.grad.abs().max()


def loss_and_gradients(call, module: nn.Module, x: Tensor, *routed: Tensor) -> list[Tensor]:
    for p in module.parameters():
        p.grad = None
    out = call(x, *routed)
    out.float().square().sum().backward()
    return [out, *(p.grad for p in module.parameters() if p.requires_grad)]


TRAINABLE = ("rank4", "sparse0.99", "drop0.5", "int4", "none")


@pytest.mark.parametrize("codec", TRAINABLE)
def test_checkpointing_and_autocast(codec: str) -> None:
    module = experts_of(codec, 3, dtype=torch.float32).train()
    x, (index, weights) = inputs(5).requires_grad_(), routing(5, 2, 3)
    expected = loss_and_gradients(module, module, x, index, weights)
    for reentrant in (True, False):

        def call(*args, reentrant=reentrant):
            return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=reentrant)

        for mine, true in zip(loss_and_gradients(call, module, x, index, weights), expected, strict=True):
            assert torch.equal(mine, true)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(module, module, x, index, weights)
    for mine, true in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - true).abs().max() < BF16 * true.abs().max()
        assert not torch.equal(mine, true)


@pytest.mark.parametrize("codec", TRAINABLE)
def test_compiled(codec: str) -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(HIDDEN, 3), experts_of(codec, 3, dtype=torch.float32).train()

        def forward(self, x: Tensor) -> Tensor:
            weights, index = self.router(x).softmax(-1).topk(2)
            return x + self.experts(x, index, weights)

    torch.manual_seed(0)
    block, x = Block(), inputs(5)
    expected = loss_and_gradients(block, block, x)
    for mine, true in zip(
        loss_and_gradients(torch.compile(block, backend="aot_eager"), block, x), expected, strict=True
    ):
        close(mine, true, 1e-4)


@pytest.mark.parametrize("codec", CODECS)
def test_state_dict_deepcopy_and_to(codec: str) -> None:
    module = experts_of(codec, 3)
    x, (index, weights) = inputs(4, torch.bfloat16), routing(4, 2, 3)
    expected = module(x, index, weights)
    empty = DersExperts([p.group for p in (module.gate_proj, module.up_proj, module.down_proj)], activate).eval()
    filled(empty, module.state_dict())
    assert torch.equal(empty(x, index, weights), expected)
    assert torch.equal(copy.deepcopy(module)(x, index, weights), expected)
    there_and_back = copy.deepcopy(module).to(torch.float32)
    assert there_and_back.up_proj.base.dtype == torch.float32
    close(there_and_back(x.float(), index, weights), expected, BF16)
    assert torch.equal(there_and_back.to(torch.bfloat16)(x, index, weights), expected)


def test_exact_needs_all_bits_of_its_base() -> None:
    made = projection_of("exact", stored="F32").to(torch.bfloat16)
    with pytest.raises(DersError, match=r"up_proj.base: .*torch.float32 or wider, found torch.bfloat16"):
        made.weight(0)


# --- two processes ---

DISTRIBUTED = ("int4", "rank4", "sparse0.99", "drop0.5")


def trained(wrap, tokens: slice, codec: str) -> dict[str, Tensor]:
    """The state after two steps of SGD on some of six tokens; wrap(module) -> what to call."""
    module = experts_of(codec, 3, dtype=torch.float32).train()
    called = wrap(module)
    x, (index, weights) = inputs(6), routing(6, 2, 3)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        # DDP and FSDP take the mean over processes: of halves, so this is the mean over all tokens
        called(x[tokens], index[tokens], weights[tokens]).square().sum(1).mean().backward()
        optimizer.step()
    return module.state_dict()


def half(rank: int, file: str) -> None:
    """One of two processes: every codec in DDP and in FSDP2; process 0 saves what became of the parameters."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}.store", rank=rank, world_size=2)
    try:
        mesh, tokens, states = init_device_mesh("cpu", (2,)), slice(3 * rank, 3 * rank + 3), {}
        for codec in DISTRIBUTED:
            states["ddp", codec] = trained(nn.parallel.DistributedDataParallel, tokens, codec)
            sharded = trained(lambda module: fully_shard(module, mesh=mesh), tokens, codec)
            states["fsdp", codec] = {name: tensor.full_tensor() for name, tensor in sharded.items()}
        if rank == 0:
            torch.save(states, file)
    finally:
        dist.destroy_process_group()


def test_ddp_and_fsdp(tmp_path: Path) -> None:
    file = str(tmp_path / "states")
    torch.multiprocessing.spawn(half, (file,), nprocs=2)
    states = torch.load(file)
    for codec in DISTRIBUTED:
        start, alone = experts_of(codec, 3, dtype=torch.float32), trained(lambda m: m, slice(0, 6), codec)
        for way in ("ddp", "fsdp"):
            assert states[way, codec].keys() == alone.keys()
            for name, before in start.state_dict().items():
                step, expected = states[way, codec][name].double() - before, alone[name].double() - before
                # the step is the difference of weights of size 1 in fp32: 2^-23 each
                assert (step - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, (way, codec, name)
                assert (expected.abs().max() > 1e-4) == start.get_parameter(name).requires_grad, (codec, name)


# --- a checkpoint ---


def test_groups_of_a_checkpoint(tmp_path: Path) -> None:
    """Names, shapes and bits are the source's; each layer has its module."""
    make("qwen3_moe", tmp_path / "moe", dtype=torch.bfloat16)
    for codec in ("exact", "drop0.5+int4", "rank4", "ternary0.1"):
        done("compress", tmp_path / "moe", "--delta", codec, "--base", "expert:1", "-o", tmp_path / codec)
        with DersSource(tmp_path / codec) as source:
            modules = runtime_groups(source)
            assert list(modules) == [f"model.layers.{n}.mlp.experts" for n in range(3)]
            for path, groups in modules.items():
                assert all(group.experts == (0, 1, 2, 3, 4) for group in groups)
                assert {group.name for group in groups} == {f"{path}.{p}_proj" for p in ("gate", "up", "down")}
                module = DersExperts(groups, activate)
                tensors = load_all(source, path)
                assert {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()} == {
                    name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
                }
                filled(module, tensors)
                for group in source.groups:
                    if group.name.startswith(f"{path}."):
                        projection = module.get_submodule(group.name.removeprefix(f"{path}."))
                        for member in range(5):
                            stored = source.read(group, member, slice(0, group.shape[0]))
                            assert np.array_equal(bits_of(projection.weight(member)), stored)


def load_all(source: DersSource, path: str) -> dict[str, Tensor]:
    """The tensors of one experts module by its own names."""
    tensors = {}
    for file in source.reader.files:
        found = load_file(source.reader.folder / file)
        tensors |= {n.removeprefix(f"{path}."): t for n, t in found.items() if n.startswith(f"{path}.")}
    return {name: tensor for name, tensor in tensors.items() if f"{path}.{name}" not in source.manifest["guards"]}


def test_a_shared_expert_in_a_group_is_refused(tmp_path: Path) -> None:
    make("qwen2_moe", tmp_path / "moe", dtype=torch.bfloat16)
    done("compress", tmp_path / "moe", "--delta", "int4", "--shared", "-o", tmp_path / "out")
    with (
        DersSource(tmp_path / "out") as source,
        pytest.raises(DersError, match="_proj: the shared expert is a member"),
    ):
        runtime_groups(source)


def test_names_of_slices() -> None:
    assert split_name("model.layers.3.mlp.experts.gate_proj") == ("model.layers.3.mlp.experts", "")
    assert split_name("model.layers.3.mlp.experts.slice12.up_proj") == ("model.layers.3.mlp.experts", "slice12")


def test_inference_mode_leaves_nothing_that_cannot_train() -> None:
    """What was made in inference mode serves a call with a gradient as well."""
    for codec in ("int4", "drop0.9", "ternary0.02", "exact", "rank4"):
        for way in ("apart", "whole"):
            module = experts_of(codec, 3)
            module.way = way
            x, (index, weights) = inputs(4, torch.bfloat16), routing(4, 2, 3)
            with torch.inference_mode():
                expected = module(x, index, weights)
            x.requires_grad_()
            found = module(x, index, weights)
            close(found, expected, BF16)
            found.sum().backward()
            assert x.grad.isfinite().all()
