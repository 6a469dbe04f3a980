"""Experts whose neurons stand in another order: found, undone before a base is taken, and put back by restore."""

import json
import math
import pickle
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from blake3 import blake3
from command import contents, ders, done
from independent_reader import read_experts, read_tensors
from safetensors.torch import load_file, save_file

from ders_cli import aligned, alignment, compare, convert, convert_group
from ders_cli.aligned import AlignedSource
from ders_cli.alignment import Neurons, NeuronSketch, NeuronSketches, aligned_source, find_orders, match
from ders_cli.analysis.blocks import layers_of, observe_layer
from ders_cli.base import MeanBase, make_base
from ders_cli.checkpoint.manifest import manifest_text
from ders_cli.checkpoint.reader import CheckpointReader, read_view
from ders_cli.errors import CheckpointError, UnsupportedError, UsageError
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.output import Options
from ders_cli.recipe import make_recipe
from ders_cli.report import Progress
from ders_cli.source import DersSource, Source, open_source

LAYOUTS: dict[str, Callable[[Path], object]] = {
    "a matrix for each": lambda folder: toy.make("mixtral", folder, dtype=torch.bfloat16),
    "F16, stacked": lambda folder: toy.make("qwen3_moe", folder, fused=True, dtype=torch.float16, num_hidden_layers=2),
    "F32, transposed": lambda folder: toy.make("llama4_text", folder, fused=True),
    "flattened": lambda folder: toy.make("dbrx", folder, dtype=torch.bfloat16),
    "no gate": lambda folder: toy.make("nemotron_h", folder, dtype=torch.bfloat16),
    "gate beside up": lambda folder: toy.make("granitemoe", folder, dtype=torch.bfloat16),
    "a shared one in front": toy.xft,
    "layers of several forms": toy.mixed,
}
Found = dict[tuple[str, str], np.ndarray]  # (layer, label) -> order


def shuffle(
    folder: Path,
    *,
    copies: bool = False,
    noise: float = 0,
    moved: Callable[[str, str], bool] = lambda layer, label: label not in ("0", "shared"),
    neurons: int | None = None,
) -> Found:
    """Put the neurons of experts in a random order, in the file's own layout; the orders that undo it.

    copies: all experts are the first one before. noise: |change| / |weights| of training afterwards. moved: which experts.
    neurons: how many of an expert's change their places.
    """
    tensors, random, undo = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3), {}
    with open_source(folder) as source:
        groups = source.groups
    for group in groups:
        layer, down = group.name.rpartition(".")[0], group.projection == "down"
        first = _view(tensors, group.members[0][1]).clone()
        for label, place in group.members:
            view, inner = _view(tensors, place), group.shape[1 if down else 0]
            if copies:
                view.copy_(first)
            if moved(layer, label):
                order = undo.get((layer, label))
                order = _order(inner, neurons, random) if order is None else order
                undo[layer, label] = order
                whence = torch.argsort(order)
                view.copy_(view.clone()[:, whence] if down else view.clone()[whence])
            if noise:
                view.add_(torch.randn(view.shape, generator=random).to(view.dtype) * noise * view.float().std())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return {key: order.numpy() for key, order in undo.items()}


def _view(tensors: dict[str, torch.Tensor], place) -> torch.Tensor:
    strides = (place.row_stride, place.column_stride)
    return torch.as_strided(tensors[place.tensor].view(-1), place.shape, strides, place.offset)


def _order(inner: int, neurons: int | None, random: torch.Generator) -> torch.Tensor:
    order = torch.arange(inner)
    some = torch.randperm(inner, generator=random)[: neurons or inner].sort().values
    order[some] = some.roll(1) if neurons else some[torch.randperm(inner, generator=random)]
    return order


def orders(folder: Path, **named) -> Found:
    with open_source(folder) as source:
        found = find_orders(source, 1, Progress(), **named)
    return {(layer, label): order for layer, own in found.items() for label, order in own.items()}


def same(found: Found, expected: Found) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


def compress(
    model: Path, out: Path, delta: str = "exact", jobs: int = 1, align: bool = True, base: str = "mean"
) -> Path:
    recipe = make_recipe({"delta": delta, "group_size": 32, "base": base})
    with open_source(model) as source, closing(make_base(base)) as chosen:
        experts = aligned_source(source, jobs, True, chosen) if align else source
        convert.run(convert.prepare(experts, recipe, out, Options(jobs=jobs), chosen))
    return out


def unrelated(folder: Path) -> Path:
    """Mixtral whose experts have no common ancestor."""
    toy.make("mixtral", folder)
    tensors, random = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor.normal_(generator=random)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def manifest(folder: Path) -> dict:
    return json.loads((folder / "ders.json").read_text())


def experts(source: Source) -> dict[tuple[str, str], np.ndarray]:
    """Stored bits of every expert as the source reads it."""
    return {
        (group.name, label): np.concatenate([source.read(group, i, rows) for rows in source.blocks(group)])
        for group in source.groups
        for i, (label, _) in enumerate(group.members)
    }


@pytest.fixture(scope="module")
def permuted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral, its experts near copies in random orders."""
    folder = tmp_path_factory.mktemp("permuted") / "model"
    toy.make("mixtral", folder)
    shuffle(folder)
    return folder


@pytest.fixture(scope="module")
def packed(permuted: Path) -> Path:
    return compress(permuted, permuted.with_name("packed"))


# --- layouts, there and back


@pytest.mark.parametrize("layout", LAYOUTS)
def test_found_undone_and_restored(tmp_path: Path, layout: str) -> None:
    """Each order is the one that was drawn; deltas cost what they cost in order; restore gives the original's files."""
    model = tmp_path / "model"
    LAYOUTS[layout](model)
    before = manifest(compress(model, tmp_path / "in order", align=False))
    undo = shuffle(model)
    assert undo and same(orders(model), undo)
    out = compress(model, tmp_path / "out")
    assert manifest(out)["bytes"]["delta"] == before["bytes"]["delta"]
    assert [g["members"][1]["source_hash"] for g in manifest(out)["groups"]] == [
        g["members"][1]["source_hash"] for g in before["groups"]
    ]
    done("restore", out, "-o", tmp_path / "again", "-q")
    assert contents(tmp_path / "again") == contents(model)
    done("verify", out)
    done("verify", out, "--against", model)
    done("verify", model, "--against", out)


def test_permuted_copies_leave_no_delta(tmp_path: Path) -> None:
    """Experts that are one expert in several orders cost what equal experts cost: a table for a chunk."""
    model = tmp_path / "model"
    toy.make("mixtral", model, dtype=torch.bfloat16)
    shuffle(model, copies=True)
    unaligned = manifest(compress(model, tmp_path / "unaligned", align=False))["bytes"]["bits_per_delta_weight"]
    out = compress(model, tmp_path / "out")
    assert all(len({m["source_hash"] for m in group["members"]}) == 1 for group in manifest(out)["groups"])
    # a chunk of 1720 weights has a table (20 bytes), states (32), a count (4) and its extents (16): 0.4 bits a weight
    assert manifest(out)["bytes"]["bits_per_delta_weight"] < 0.5 < 8 < unaligned


def test_fine_tuned_after_the_permutation(tmp_path: Path) -> None:
    """Cosines of 0.8: noise of three quarters of the weights on each."""
    model = tmp_path / "model"
    toy.make("mixtral", model)
    undo = shuffle(model, copies=True, noise=0.5, moved=lambda layer, label: label != "0")
    assert same(orders(model), undo)
    out = compress(model, tmp_path / "out", "int4")
    done("verify", out, "--against", model)
    assert all(m["error"]["weight"] < 0.1 for group in manifest(out)["groups"] for m in group["members"])


def test_only_what_is_permuted_is_touched(tmp_path: Path) -> None:
    """One expert of one layer, three of its neurons: no other layer has an order, no other expert another one."""
    model = tmp_path / "model"
    toy.make("mixtral", model)
    undo = shuffle(model, neurons=3, moved=lambda layer, label: (".1." in layer, label) == (True, "2"))
    assert same(orders(model), undo) and (undo["model.layers.1.mlp.experts", "2"] != np.arange(toy.INNER)).sum() == 3
    out = compress(model, tmp_path / "out")
    assert manifest(out)["aligned"] == ["model.layers.1.mlp.experts.order"]
    table = load_file(out / "model.safetensors")["model.layers.1.mlp.experts.order"]
    assert table.dtype == torch.int32 and table.shape == (3, toy.INNER)
    assert (table[:2] == torch.arange(toy.INNER)).all() and (table[2].numpy() == list(undo.values())[0]).all()


def test_duplicate_and_zero_neurons(tmp_path: Path) -> None:
    """Neurons that cannot be told apart: any of their orders leaves equal experts."""
    model = tmp_path / "model"
    toy.make("mixtral", model, dtype=torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts.0.w" in name:
            neurons = tensor.T if ".w2." in name else tensor
            neurons[5:9], neurons[20:30], neurons[2, 3:] = neurons[4].clone(), 0, -0.0
            if ".w1." in name:  # alike in gate alone
                neurons[11] = neurons[10].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    shuffle(model, copies=True)
    out = compress(model, tmp_path / "out")
    assert all(len({m["source_hash"] for m in group["members"]}) == 1 for group in manifest(out)["groups"])
    done("restore", out, "-o", tmp_path / "again", "-q")
    assert contents(tmp_path / "again") == contents(model)


def test_unrelated_experts_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with open_source(unrelated(tmp_path / "model")) as source:
        assert aligned_source(source, 1, True) is source
    assert "one order already" in capsys.readouterr().err


def test_experts_of_two_families(tmp_path: Path) -> None:
    """The first expert is related to none: the others are brought into the order of the first of them."""
    model = tmp_path / "model"
    toy.make("qwen3_moe", model, num_hidden_layers=1)
    undo = shuffle(model, copies=True, moved=lambda layer, label: label in ("2", "3"))
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if ".experts.0." in name:
            tensor.normal_(generator=torch.Generator().manual_seed(1))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert same(orders(model), undo)


@pytest.mark.parametrize(
    "flags", [("--experts-per-layer", "2-4"), ("--experts", 4, "--split", 2)], ids=["2, 4", "slices"]
)
def test_layers_of_several_sizes_and_slices(tmp_path: Path, flags: tuple) -> None:
    """Upcycled models: layers with 2 and 4 experts; experts of which every second is a copy of the same slice."""
    toy.dense(tmp_path / "dense", intermediate_size=44)
    done("upcycle", tmp_path / "dense", *flags, "--rank", 1, "-o", tmp_path / "packed", "-q")
    done("restore", tmp_path / "packed", "-o", tmp_path / "model", "-q")
    undo = shuffle(tmp_path / "model", noise=0.05, moved=lambda layer, label: label not in ("0", "1"))
    assert undo and same(orders(tmp_path / "model"), undo)
    out = compress(tmp_path / "model", tmp_path / "out")
    done("restore", out, "-o", tmp_path / "again", "-q")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")


def test_base_gives_the_order(tmp_path: Path) -> None:
    """With a dense base or one expert as base, its order counts, and that of the first expert is undone too."""
    model, dense = tmp_path / "model", tmp_path / "dense"
    toy.make("qwen3_moe", model, num_hidden_layers=1)
    toy.dense(dense, "qwen3", num_hidden_layers=1, head_dim=10)
    shuffle(model, copies=True, moved=lambda layer, label: False)
    tensors, ffn = load_file(dense / "model.safetensors"), load_file(model / "model.safetensors")
    for projection in ("gate", "up", "down"):
        name = f"model.layers.0.mlp.{{}}{projection}_proj.weight"
        tensors[name.format("")] = ffn[name.format("experts.0.")]
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    undo = shuffle(model, moved=lambda layer, label: label != "3")
    for text in (str(dense), "expert:3"):
        with closing(make_base(text)) as base:
            assert same(orders(model, base=base), undo)
    out = compress(model, tmp_path / "out", "none", base=str(dense))
    assert all(m["error"]["weight"] == 0 for group in manifest(out)["groups"] for m in group["members"])


def test_shared_expert_in_the_group(tmp_path: Path) -> None:
    model = tmp_path / "model"
    toy.make("qwen2_moe", model)
    with open_source(model, shared=True) as source:
        groups = source.groups
    tensors = load_file(model / "model.safetensors")
    whence = torch.randperm(toy.INNER, generator=torch.Generator().manual_seed(0))
    for group in groups:  # the shared expert becomes expert 0 in another order
        first, last = (_view(tensors, place) for _, place in (group.members[0], group.members[-1]))
        last.copy_(first[:, whence] if group.projection == "down" else first[whence])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with open_source(model, shared=True) as source:
        chosen = aligned_source(source, 1, True)
        assert {label for own in chosen.orders.values() for label in own} == {"shared"}
        convert.run(
            convert.prepare(chosen, make_recipe({"delta": "exact", "shared": True}), tmp_path / "out", Options())
        )
    done("restore", tmp_path / "out", "-o", tmp_path / "again", "-q")
    assert contents(tmp_path / "again") == contents(model)


@pytest.mark.parametrize(
    "make", [lambda f: toy.make("gpt_oss", f), lambda f: toy.moe_llava(f, "phi")], ids=["stacked", "each"]
)
def test_biases_are_refused(tmp_path: Path, make) -> None:
    """They would stay in the original's order. Where nothing is permuted there is nothing to refuse."""
    model = tmp_path / "model"
    make(model)
    assert orders(model) == {}
    shuffle(model)
    with open_source(model) as source, pytest.raises(UnsupportedError, match=r"bias.*follows the neurons"):
        aligned_source(source, 1, True)


def test_biases_of_down_are_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are added to the output, also where they are as long as there are neurons."""
    monkeypatch.setattr(toy, "INNER", toy.HIDDEN)
    model = tmp_path / "model"
    toy.moe_llava(model, "phi")
    tensors = {n: t for n, t in load_file(model / "model.safetensors").items() if not n.endswith("fc1.bias")}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    undo = shuffle(model)
    assert same(orders(model), undo)


# --- the order, against slower ways


def test_sketch_of_blocks_and_of_some_neurons() -> None:
    """A neuron's sketch is the same bit by bit whatever blocks its weights came in, and whoever else is sketched."""
    random = np.random.Generator(np.random.Philox(key=1))
    for inner, hidden in ((43, 40), (150, 333), (7, 64), (1, 1), (65, 1000)):
        groups = {p: _group(p, (hidden, inner) if p == "down" else (inner, hidden)) for p in ("gate", "up", "down")}
        weights = {p: random.standard_normal(g.shape, np.float32).view(np.uint32) for p, g in groups.items()}
        some = np.sort(random.permutation(inner)[: inner // 2 + 1])
        found = []
        for neurons, step in ((None, 10**6), (None, 1), (None, 17), (some, 10**6), (some, 5)):
            sketch = NeuronSketch(groups, neurons)
            for projection, bits in weights.items():
                for begin in range(0, len(bits), step):
                    sketch.add(
                        projection, slice(begin, min(len(bits), begin + step)), bits[begin : begin + step], "F32"
                    )
            found.append(sketch.finished())
        for whole in found[1:3]:
            assert whole.keys == found[0].keys and np.array_equal(whole.vectors, found[0].vectors)
        for part in found[3:]:
            assert part.keys == [found[0].keys[n] for n in some]


def _group(projection: str, shape: tuple[int, int]):
    view = MatrixView("t", shape, 0, shape[1], 1)
    return ExpertGroup(f"model.layers.0.mlp.experts.{projection}_proj", 0, projection, "F32", (("0", view),))


def test_sketches_keep_cosines() -> None:
    """Cosines of sketches scatter about the true ones by 1 / sqrt(3 * 64), and products are whole numbers."""
    random = np.random.Generator(np.random.Philox(key=2))
    groups = {p: _group(p, (2000, 300) if p == "down" else (300, 2000)) for p in ("gate", "up", "down")}
    one, other = NeuronSketch(groups), NeuronSketch(groups)
    true = np.zeros(300)
    for projection, group in groups.items():
        a = random.standard_normal(group.shape, np.float32) + 0.5  # a mean that all share, which signs must take away
        b = 0.7 * a + 0.3 * random.standard_normal(group.shape, np.float32)
        for sketch, weights in ((one, a), (other, b)):
            sketch.add(projection, slice(0, group.shape[0]), weights.view(np.uint32), "F32")
        a, b = (w.T if projection == "down" else w for w in (a.astype(float), b.astype(float)))
        true += (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)) / 3
    first, second = one.finished(), other.finished()
    products = first.vectors @ second.vectors.T
    assert np.array_equal(products, np.rint(products)) and products.max() < 2**24
    # sqrt(1/192) times (1 - cos^2) for pairs that are alike: 0.01; three standard errors of 300 neurons' scatter
    assert abs(np.std(products.diagonal() / first.full - true) - 0.012) < 0.006
    unlike = products[~np.eye(300, dtype=bool)] / first.full
    # the means alone give unlike neurons 0.5 * 0.35 / sqrt((1 + 0.25) * (0.49 + 0.09 + 0.1225)) = 0.187; without signs 0.5
    assert abs(unlike.mean() - 0.187) < 0.03 and np.std(unlike) < 0.08


def _nearest_by_hand(reference: np.ndarray, member: np.ndarray, least: float) -> list[tuple[int, int]]:
    found = []
    for k, theirs in enumerate(reference):
        for j, own in enumerate(member):
            score = float(own @ theirs)
            nearest = score >= max(float(own @ other) for other in reference)
            first = not any(float(own @ reference[i]) == score for i in range(k))
            chosen = score >= max(float(other @ theirs) for other in member)
            taken = any(k == place for place, _ in found)
            if score >= least and nearest and first and chosen and not taken:
                found.append((k, j))
    return found


def test_nearest_pairs_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of any size, ties, unequal numbers: the pairs that comparing each with each gives."""
    random = np.random.Generator(np.random.Philox(key=3))
    for f, m in ((1, 1), (9, 9), (13, 8), (5, 17)):
        reference, member = (random.integers(-2, 3, (n, 3)).astype(np.float32) for n in (f, m))
        expected = _nearest_by_hand(reference, member, 1)
        for similarities in (1, 3 * f, 10**6):
            monkeypatch.setattr(alignment, "SIMILARITIES", similarities)
            at, who = alignment._nearest_pairs(reference, member, 1)
            assert list(zip(at.tolist(), who.tolist())) == expected


def test_match_is_a_permutation_of_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, zeros, few of a kind, rounds that find nothing: each neuron once; and with itself in order."""
    monkeypatch.setattr(alignment, "SAMPLE", 5)
    random = np.random.Generator(np.random.Philox(key=4))
    for trial in range(60):
        n = int(random.integers(1, 30))
        a, b = (random.integers(-1, 2, (n, 2)).astype(np.float32) * (trial % 3) for _ in range(2))
        if trial % 2:
            b = a[random.permutation(n)]
        reference, member = (Neurons(v, [row.tobytes() for row in v], 4.0) for v in (a, b))
        order, share = match(reference, member)
        assert sorted(order.tolist()) == list(range(n)) and order.dtype == np.int32 and 0 <= share <= 1
        if trial % 2:
            assert np.array_equal(b[order], a) and share == 1
        assert aligned.is_identity(match(reference, reference)[0])


def test_what_is_in_order_is_not_compared_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near copies in order, of any size, cost their sketches and no more."""
    toy.make("mixtral", tmp_path)
    monkeypatch.delattr(alignment, "_nearest_pairs")
    assert orders(tmp_path) == {}


def test_what_has_no_partner_stays_where_it_can() -> None:
    """One neuron went from 0 to 2, the rest is unrelated: only the one that it pushed aside moves too."""
    vectors = np.eye(8, dtype=np.float32)
    reference, member = (Neurons(vectors[v], [bytes([n]) for n in v], 1.0) for v in ([0, 1, 2, 3], [4, 5, 0, 6]))
    assert match(reference, member)[0].tolist() == [2, 1, 0, 3]


def test_a_sample_spares_unrelated_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none of the sample has its like, the rest is not looked at."""
    monkeypatch.setattr(alignment, "SAMPLE", 10)
    monkeypatch.delattr(alignment, "_nearest_pairs")
    one, other = (v.astype(np.float32) for v in np.eye(200, dtype=int).reshape(2, 100, 200))
    order, share = match(*(Neurons(v, [row.tobytes() for row in v], 1.0) for v in (one, other)))
    assert aligned.is_identity(order) and share == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = tmp_path / "model"
    toy.make("mixtral", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.block_sparse_moe.experts.1.w1.weight"][3, 4] = value
    tensors["model.layers.0.block_sparse_moe.experts.0.w2.weight"][6] = value  # in every neuron
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    undo = shuffle(model)
    assert same(orders(model), undo)  # gate and up tell; the neuron with the NaN is the one that is left
    out = compress(model, tmp_path / "out")
    done("restore", out, "-o", tmp_path / "again", "-q")
    assert contents(tmp_path / "again") == contents(model)
    assert _analysed(model)["model.layers.0.mlp.experts"]["permuted"].keys() == {"0", "1", "2"}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("read_bytes", [1, 1 << 30], ids=["row by row", "whole"])
def test_reading_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read_bytes: int) -> None:
    """Rows of their own, interleaved, transposed: what reordering the whole matrix gives, in blocks of any size."""
    monkeypatch.setattr(aligned, "READ_BYTES", read_bytes)
    toy.make(name, tmp_path, fused=True, num_hidden_layers=2)
    random = np.random.Generator(np.random.Philox(key=5))
    with open_source(tmp_path) as source:
        names = {group.name.rpartition(".")[0] for group in source.groups}
        own = {layer: {"1": random.permutation(toy.INNER).astype(np.int32)} for layer in names}
        chosen = AlignedSource(source, own)
        for group in source.groups:
            for i, (label, view) in enumerate(group.members):
                strides, whole = (view.row_stride, view.column_stride), slice(0, view.shape[0])
                expected = read_view(source.reader, view.tensor, view.offset, strides, view.shape, whole)
                if label == "1":
                    order = own[group.name.rpartition(".")[0]]["1"]
                    expected = expected[:, order] if group.projection == "down" else expected[order]
                for step in (1, 7, 100):
                    blocks = range(0, view.shape[0], step)
                    found = [chosen.read(group, i, slice(r, min(view.shape[0], r + step))) for r in blocks]
                    assert np.array_equal(np.concatenate(found), expected)


def test_reading_rows_that_stand_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second row of a tensor, one by one."""
    monkeypatch.setattr(aligned, "READ_BYTES", 1)
    toy.make("mixtral", tmp_path)
    order = np.random.Generator(np.random.Philox(key=6)).permutation(30).astype(np.int32)
    view = MatrixView("lm_head.weight", (30, toy.HIDDEN), toy.HIDDEN, 2 * toy.HIDDEN, 1)
    with open_source(tmp_path) as source:
        chosen = AlignedSource(source, {"x": {"0": order}})
        found = [
            chosen.read(ExpertGroup("x.up_proj", 0, "up", "F32", (("0", view),)), 0, slice(r, r + 1)) for r in range(30)
        ]
        assert np.array_equal(np.concatenate(found), source.reader.read("lm_head.weight")[1:60:2][order])


# --- the checkpoint


def test_any_number_of_threads(permuted: Path, packed: Path, tmp_path: Path) -> None:
    assert contents(compress(permuted, tmp_path / "out", jobs=3)) == contents(packed)
    done("restore", packed, "-o", tmp_path / "again", "-q", "-j", 3)
    assert contents(tmp_path / "again") == contents(permuted)


def test_the_command(permuted: Path, packed: Path, tmp_path: Path) -> None:
    """--align is what the functions do; a plan needs no more; without anything to align it changes nothing."""
    flags = ("--delta", "exact", "--group-size", 32, "-q")
    done("compress", permuted, *flags, "--align", "-o", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(packed)
    plan = done("compress", permuted, *flags, "--align", "--dry-run", "--json", "-o", tmp_path / "none").json["plan"]
    assert plan["output_bytes"] >= sum(len(data) for data in contents(packed).values())
    toy.make("mixtral", tmp_path / "ordinary")
    done("compress", tmp_path / "ordinary", *flags, "-o", tmp_path / "without")
    ran = done("compress", tmp_path / "ordinary", *flags, "--align", "-o", tmp_path / "with")
    assert "ders: note: --align: all experts' neurons stand in one order already; nothing to undo\n" in ran.err
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


def test_written_as_the_format_says(permuted: Path, packed: Path) -> None:
    """docs/format.md, section 7, by a reader of its own: each expert of the original."""
    document, original, decoded, compared = manifest(packed), read_tensors(permuted), read_experts(packed), 0
    tensors = load_file(packed / "model.safetensors")
    for group in document["groups"]:
        table = tensors[f"{group['name'].rpartition('.')[0]}.order"].numpy()
        for i, member in enumerate(group["members"]):
            found = np.empty_like(decoded[group["name"], member["label"]])
            for k, j in enumerate(table[i]):
                if group["projection"] == "down":
                    found[:, j] = decoded[group["name"], member["label"]][:, k]
                else:
                    found[j] = decoded[group["name"], member["label"]][k]
            assert np.array_equal(found.reshape(-1), original[member["tensor"]].view(found.dtype).reshape(-1))
            compared += 1
    assert compared == 18 and document["aligned"] == [ORDER, ORDER.replace("0", "1")]


def test_other_processes_read_it_too(permuted: Path) -> None:
    """The Ray engine sends a source to other nodes."""
    with open_source(permuted) as source, aligned_source(source, 1, True) as chosen:
        with pickle.loads(pickle.dumps(chosen)) as there:
            assert all(np.array_equal(bits, experts(there)[key]) for key, bits in experts(chosen).items())


def test_converting_an_aligned_checkpoint_keeps_the_orders(permuted: Path, packed: Path, tmp_path: Path) -> None:
    """exact, then int4: the bytes of int4 at once. --align itself goes with the original."""
    done("compress", packed, "--delta", "int4", "--group-size", 32, "-o", tmp_path / "twice", "-q")
    once = compress(permuted, tmp_path / "once", "int4")
    assert contents(tmp_path / "twice") == contents(once)
    with open_source(packed) as source, pytest.raises(UsageError, match="--align goes with the original"):
        aligned_source(source, 1, True)


def test_an_interrupted_run_is_of_its_orders(permuted: Path, tmp_path: Path) -> None:
    """What an unaligned run has begun is not gone on with by an aligned one."""
    with open_source(permuted) as source, aligned_source(source, 1, True) as chosen:
        plain, own = (
            convert.fingerprint(s, make_recipe({"delta": "int4"}), Options(), MeanBase()) for s in (source, chosen)
        )
    assert {key for key in own if own[key] != plain[key]} == {"order of neurons (--align)"}


def test_names_that_are_taken(permuted: Path, tmp_path: Path) -> None:
    tensors = load_file(permuted / "model.safetensors") | {"model.layers.0.mlp.experts.order": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((permuted / "config.json").read_bytes())
    with open_source(tmp_path) as source, pytest.raises(UnsupportedError, match=r"experts\.order: the source has"):
        aligned_source(source, 1, True)


def _rewrite(packed: Path, out: Path, change: Callable[[dict, dict], None]) -> Path:
    """A copy whose tensors and ders.json are changed, with hashes that hold."""
    out.mkdir()
    document, tensors = manifest(packed), load_file(packed / "model.safetensors")
    change(document, tensors)
    for name, tensor in tensors.items():
        if name.endswith(".order"):
            document["tensors"][name] = [blake3(tensor.numpy().tobytes()).hexdigest()]
    for name in set(document["tensors"]) - set(tensors):
        del document["tensors"][name]
    for name, data in contents(packed).items():
        (out / name).write_bytes(data)
    save_file(tensors, out / "model.safetensors")
    del document["checksum"]
    (out / "ders.json").write_bytes(manifest_text(document))
    return out


ORDER = "model.layers.0.mlp.experts.order"


def _set(value: int) -> Callable[[dict, dict], None]:
    return lambda document, tensors: tensors[ORDER].__setitem__((1, 4), value)


HOSTILE: dict[str, tuple[Callable[[dict, dict], None], str]] = {
    "one twice": (lambda d, t: t[ORDER].__setitem__((1, 4), int(t[ORDER][1, 5])), "each of its 43 neurons once"),
    "too large": (_set(43), "each of its 43 neurons once"),
    "negative": (_set(-1), "each of its 43 neurons once"),
    "huge": (_set(2**31 - 1), "each of its 43 neurons once"),
    "another shape": (lambda d, t: t.update({ORDER: t[ORDER][:2].clone()}), r"expected I32 \[3, 43\]"),
    "another dtype": (lambda d, t: t.update({ORDER: t[ORDER].long()}), r"found I64 \[3, 43\]"),
    "missing": (lambda d, t: t.__delitem__(ORDER), "no such tensor"),
    "of no layer": (lambda d, t: d["aligned"].append("model.layers.7.order"), "expected LAYER.order"),
    "another tensor": (lambda d, t: d["aligned"].append("lm_head.weight"), "expected LAYER.order"),
    "twice": (lambda d, t: d["aligned"].append(ORDER), "order: 2 times; expected once"),
    "no list": (lambda d, t: d.update(aligned=3), "aligned: Input should be a valid list"),
    "no names": (lambda d, t: d.update(aligned=[[]]), "aligned.0: Input should be a valid string"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_orders(packed: Path, tmp_path: Path, what: str) -> None:
    """One sentence and exit code 4, before anything is written; never a file of other bytes."""
    change, sentence = HOSTILE[what]
    bad = _rewrite(packed, tmp_path / "bad", change)
    again = ("-o", tmp_path / "again")
    for command in (("restore", bad, *again), ("verify", bad), ("compress", bad, "--delta", "int4", *again)):
        ran = ders(*command)
        assert (ran.code, ran.err.count("\n")) == (4, 1), (ran.code, ran.err)
        with pytest.raises(CheckpointError, match=sentence):
            raise CheckpointError(ran.err)
    assert not (tmp_path / "again").exists()


def test_another_order_is_noticed(packed: Path, tmp_path: Path) -> None:
    """A permutation all the same, with a hash that is right: the experts are not the original's any more."""
    swap = [1, 0, *range(2, toy.INNER)]
    bad = _rewrite(packed, tmp_path / "bad", lambda d, t: t.update({ORDER: t[ORDER][:, swap].contiguous()}))
    ran = ders("verify", bad, "--against", packed.with_name("model"))
    assert ran.code == 3 and "model.layers.0.mlp.experts.gate_proj, expert 1" in ran.out + ran.err


def test_damaged_order(packed: Path, tmp_path: Path) -> None:
    """A hash that is wrong is found as of any tensor."""
    bad = _rewrite(packed, tmp_path / "bad", lambda d, t: None)
    tensors = load_file(bad / "model.safetensors")
    tensors[ORDER] = tensors[ORDER][:, [1, 0, *range(2, toy.INNER)]].contiguous()
    save_file(tensors, bad / "model.safetensors")
    ran = ders("verify", bad)
    assert ran.code == 3 and ORDER in ran.out + ran.err


@pytest.mark.parametrize("changed", ["the original", "the packed one"])
def test_swapped_experts_are_named(permuted: Path, packed: Path, tmp_path: Path, changed: str) -> None:
    """Each expert is compared in its own order; one in another's place is recognised all the same."""
    other = tmp_path / "other"
    other.mkdir()
    for name, data in contents(permuted).items():
        (other / name).write_bytes(data)
    tensors = load_file(permuted / "model.safetensors")
    one, two = (f"model.layers.0.block_sparse_moe.experts.{e}.w3.weight" for e in (1, 2))
    tensors[one], tensors[two] = tensors[two], tensors[one]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    tested, reference = (packed, other) if changed == "the original" else (other, packed)
    ran = ders("verify", tested, "--against", reference, "--json")
    said = {f["where"]: f["problem"] for f in ran.json["findings"]}
    assert ran.code == 3 and len(said) == 2, ran.out
    for label, held in (("1", "2"), ("2", "1")):
        assert f"holds the reference's expert {held}" in said[f"model.layers.0.mlp.experts.up_proj, expert {label}"]


def test_lossy_experts_are_compared_by_reading_each_once(
    permuted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No decoded hash is the original's, but the sum of an expert's bits says in any order that it is no other one."""
    packed, asked = compress(permuted, tmp_path / "int4", "int4"), []
    read = AlignedSource.read_in

    def counted(self: AlignedSource, group: ExpertGroup, member: int, *more) -> np.ndarray:
        asked.append((group.name, member))
        return read(self, group, member, *more)

    monkeypatch.setattr(AlignedSource, "read_in", counted)
    done("verify", packed, "--against", permuted)
    assert len(asked) == len(set(asked)) == 2 * 3 * 2  # layers, projections, experts in another order
    asked.clear()
    assert ders("verify", permuted, "--against", packed).code in (0, 3)
    assert len(asked) == len(set(asked)) == 2 * 3 * 2


# --- transposed matrices, of which all is read for any rows


@pytest.fixture(scope="module")
def transposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transposed") / "model"
    toy.make("llama4_text", folder, fused=True, dtype=torch.bfloat16)
    shuffle(folder)
    return folder


def test_transposed_matrices_are_read_once(transposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the blocks are, as long as all experts' rows fit in memory."""
    for module in (convert_group, compare):
        monkeypatch.setattr(module, "BLOCK_WEIGHTS", 64)
    read, count = CheckpointReader.read_bytes, Counter()

    def counted(self: CheckpointReader, name: str, at: int, out: np.ndarray) -> None:
        if self.folder == transposed:
            count[name] += out.nbytes
        read(self, name, at, out)

    with open_source(transposed) as source:
        chosen = aligned_source(source, 1, True)
        assert isinstance(chosen, AlignedSource)
        conversion = convert.prepare(chosen, make_recipe({"delta": "int4"}), tmp_path / "out", Options())
        monkeypatch.setattr(CheckpointReader, "read_bytes", counted)
        convert.run(conversion)
        matrices = {view.tensor for group in chosen.groups for _, view in group.members}
        expected = {name: chosen.reader.tensors[name].nbytes for name in matrices}
    assert {name: count[name] for name in matrices} == expected
    count.clear()
    done("verify", tmp_path / "out", "--against", transposed)
    assert {name: count[name] for name in matrices} == expected


@pytest.mark.parametrize("delta", ["int4", "exact", "rank2"])
@pytest.mark.parametrize("most", [1, 4000, 20000])
def test_transposed_matrices_in_any_chunks(
    transposed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delta: str, most: int
) -> None:
    expected = compress(transposed, tmp_path / "expected", delta)
    for module in (aligned, convert_group, compare):
        monkeypatch.setattr(module, "MEAN_BYTES", most)
    monkeypatch.setattr(convert_group, "BLOCK_WEIGHTS", 200)
    out = compress(transposed, tmp_path / "out", delta)
    tensors, its = (load_file(folder / "model.safetensors") for folder in (out, expected))
    assert all(torch.equal(tensors[name], its[name]) for name in {**tensors, **its})
    done("verify", out, "--against", transposed)


# --- faults are named as the original has them


@pytest.mark.parametrize("name", ["w1", "w2"])
@pytest.mark.parametrize("packed_first", [False, True])
def test_numbers_that_are_not_finite(permuted: Path, tmp_path: Path, name: str, packed_first: bool) -> None:
    """At their place in the original, whether its neurons are put in order now or were before."""
    model, tensor = tmp_path / "model", f"model.layers.0.block_sparse_moe.experts.1.{name}.weight"
    model.mkdir()
    for file, data in contents(permuted).items():
        (model / file).write_bytes(data)
    tensors = load_file(model / "model.safetensors")
    tensors[tensor][3, 5] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if packed_first:
        model = compress(model, tmp_path / "packed")
    ran = ders("compress", model, "--delta", "int4", *([] if packed_first else ["--align"]), "-o", tmp_path / "out")
    assert ran.code == 4 and f"{tensor}: nan at [3, 5] of expert 1's" in ran.err


def test_two_orders(permuted: Path, packed: Path, tmp_path: Path) -> None:
    """Two DeRS checkpoints are compared where their orders are the same, refused where they are not."""
    other = compress(permuted, tmp_path / "int4", "int4")
    assert ders("verify", other, "--against", packed).code == 0
    unaligned = compress(permuted, tmp_path / "unaligned", align=False)
    turned = _rewrite(packed, tmp_path / "turned", lambda d, t: t.update({ORDER: t[ORDER].flip(1).contiguous()}))
    for another in (unaligned, turned):
        ran = ders("verify", packed, "--against", another)
        assert ran.code == 2 and "stand in different orders" in ran.err


# --- the runtime


@pytest.mark.parametrize("dequantize", ["0", "1"])
def test_outputs_are_the_original_model_s(
    permuted: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dequantize: str
) -> None:
    """The extra tensors are no remark of the loader, and logits are those of the original: fp32 sums in another order."""
    from test_hf import CLOSE, load, logits, stock

    monkeypatch.setenv("DERS_DEQUANTIZE", dequantize)
    model = load(packed, experts_implementation="eager")
    assert (logits(model) - logits(stock(permuted))).abs().max() < CLOSE
    if dequantize == "0":
        model.save_pretrained(tmp_path / "saved")
        assert contents(tmp_path / "saved")["model.safetensors"] == contents(packed)["model.safetensors"]
        done("restore", tmp_path / "saved", "-o", tmp_path / "again", "-q")
        assert contents(tmp_path / "again")["model.safetensors"] == contents(permuted)["model.safetensors"]
        state = load_file(packed / "model.safetensors")
        assert ORDER in state
        model.load_state_dict(state)  # as Trainer resumes


# --- analysis


def _analysed(model: Path) -> dict[str, dict]:
    with open_source(model) as source:
        found = {}
        for name, groups in layers_of(source).items():
            observer = NeuronSketches(groups)
            base = None if isinstance(source, DersSource) else MeanBase()
            observe_layer(source, base, groups, [observer], lambda count: None)
            found[name] = observer.found()
        return found


def test_analysis_sees_permuted_experts(permuted: Path, packed: Path, tmp_path: Path) -> None:
    assert all(f["permuted"] == {"0": False, "1": True, "2": True} for f in _analysed(permuted).values())
    assert all(f["matched"] == 1 for f in _analysed(permuted).values())
    toy.make("mixtral", tmp_path / "ordinary")
    for model in (packed, tmp_path / "ordinary"):
        assert all(f == {"permuted": dict.fromkeys("012", False), "matched": 1} for f in _analysed(model).values())
    native = _analysed(unrelated(tmp_path / "native"))
    assert all(f == {"permuted": dict.fromkeys("012", False), "matched": 0} for f in native.values())


def test_analysis_of_one_permuted_expert(tmp_path: Path) -> None:
    model = tmp_path / "model"
    toy.make("mixtral", model)
    shuffle(model, neurons=10, moved=lambda layer, label: (".0." in layer, label) == (True, "1"))
    found = _analysed(model)
    assert found["model.layers.0.mlp.experts"]["permuted"] == {"0": False, "1": True, "2": False}
    assert not any(found["model.layers.1.mlp.experts"]["permuted"].values())


def test_analysis_samples_large_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer with more neurons than the sample, those that are drawn tell."""
    monkeypatch.setattr(alignment, "SAMPLE", 8)
    model = tmp_path / "model"
    toy.make("mixtral", model)
    assert not any(p for f in _analysed(model).values() for p in f["permuted"].values())
    shuffle(model)
    assert all(f["permuted"] == {"0": False, "1": True, "2": True} for f in _analysed(model).values())


def test_analysis_of_matrices_that_do_not_fit() -> None:
    """A stranger's ders.json: said to be no permutation, and no fault."""
    groups = {"up": _group("up", (4, 5)), "down": _group("down", (5, 3))}
    assert NeuronSketches(groups).found() == {"permuted": {"0": False}, "matched": 0.0}
    assert NeuronSketches({"gate": groups["up"]}).found() == {"permuted": {"0": False}, "matched": 0.0}
