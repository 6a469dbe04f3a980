"""Predictions against the long way: every matrix coded whole, in fp64 the FFN's outputs with it alone in place of its original."""

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from command import done
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats

from ders_cli.analysis import blocks, outputs
from ders_cli.analysis.blocks import Block, layers_of, observe_layer
from ders_cli.analysis.outputs import Sample
from ders_cli.analysis.prediction import HELD_BYTES, LayerPrediction, Predicted, combined
from ders_cli.base import ExpertBase, MeanBase
from ders_cli.codecs import exact, parse_codec
from ders_cli.compare import random_states
from ders_cli.errors import UsageError
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.source import Source, open_source

TERMS = "int8 int4 int2 int1 ternary0.1 drop0.8 drop0.8+int4 top0.2 2:4 int1+int4 none exact".split()
SEED = 3
# Ours is fp32 products of errors, the reference's fp64 products of weights; energies add up thousands of fp32 terms, 6e-8 each.
TOLERANCE = 1e-5


def codecs_of(terms) -> list:
    return [parse_codec(term, 16) for term in terms]


def whole(source: Source, group: ExpertGroup, base) -> tuple[list[np.ndarray], np.ndarray]:
    """Stored bits [out, in] of every expert, and of the base."""
    rows = slice(0, group.shape[0])
    experts = [source.read(group, i, rows) for i in range(len(group.members))]
    return experts, base.rows(group, rows, lambda i, rows: experts[i])


def activation(name: str, gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
    """Of fp64 products, by torch's own functions."""
    act = {
        "silu": torch.nn.functional.silu,
        "gelu_new": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu2": lambda x: torch.relu(x) ** 2,
        "gpt_oss": None,
    }[name]
    up = torch.from_numpy(up)
    if gate is None:
        return act(up).numpy()
    gate = torch.from_numpy(gate)
    if act is None:
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        return (gate * torch.sigmoid(1.702 * gate) * up).numpy()
    return (act(gate) * up).numpy()


def ffn(source: Source, weights: dict[str, np.ndarray], states: np.ndarray) -> np.ndarray:
    """fp64 [T, hidden] of one expert's FFN; weights fp64 [out, in] by projection."""
    gate = states @ weights["gate"].T if "gate" in weights else None
    return activation(source.activation, gate, states @ weights["up"].T) @ weights["down"].T


def reference(source: Source, groups, base, states: dict[str, np.ndarray], codecs, seed: int) -> dict:
    """What LayerPrediction.found should be, of the experts that `states` names."""
    wide = {p: whole(source, group, base) for p, group in groups.items()}
    found = {p: {} for p in groups}
    for i, label in ((i, label) for i, (label, _) in enumerate(groups["up"].members) if label in states):
        x = states[label].astype(np.float64)
        own = {p: floats.widen(experts[i], groups[p].dtype).astype(np.float64) for p, (experts, _) in wide.items()}
        shared = {p: floats.widen(bits, groups[p].dtype).astype(np.float64) for p, (_, bits) in wide.items()}
        y, y_base = ffn(source, own, x), ffn(source, shared, x)
        for p, group in groups.items():
            found[p][label] = {}
            for codec in codecs:
                expert, bits = wide[p][0][i], wide[p][1]
                parts = codec.encode_expert(expert, bits, group.dtype, make_key(seed, group.name, label), 0)
                key = make_key(seed, group.name, label)
                coded = floats.widen(codec.decode_expert(parts, bits, group.dtype, key, 0), group.dtype)
                coded, w, b = coded.astype(np.float64), own[p], shared[p]
                changed = ffn(source, own | {p: coded}, x) - y
                size = sum(part.nbytes for part in parts.values()) + 16 * (codec.term == "exact")  # one chunk's extent
                norm = np.linalg.norm
                found[p][label][codec.term] = Predicted(
                    size,
                    norm(coded - w) / norm(w),
                    norm(coded - w) / norm(w - b),
                    float(((coded - b) * (w - b)).sum() / norm(w - b) ** 2),
                    norm(changed) / norm(y),
                    norm(changed) / norm(y - y_base),
                )
    return found


def predict(source: Source, groups, base, prediction) -> dict:
    observe_layer(source, base, groups, [prediction], lambda done: None)
    return prediction.found()


def assert_alike(found: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert found.keys() == expected.keys()
    for projection, labels in expected.items():
        assert found[projection].keys() == labels.keys()
        for label, terms in labels.items():
            assert list(found[projection][label]) == list(terms)
            for term, one in terms.items():
                for name, value in vars(one).items():
                    got = getattr(found[projection][label][term], name)
                    where = f"{projection} {label} {term} {name}: {got} for {value}"
                    assert got == (value if name == "bytes" else pytest.approx(value, rel=tolerance, nan_ok=True)), (
                        where
                    )


def make(name: str, dtype: torch.dtype, folder: Path) -> Path:
    if name == "phi":
        toy.moe_llava(folder, "phi", dtype=dtype)
    elif name == "mixed":
        toy.mixed(folder, dtype)
    else:
        toy.make(name, folder, dtype=dtype)
    return folder


CASES = [
    ("mixed", torch.bfloat16),
    ("mixed", torch.float16),
    ("phi", torch.float32),
    ("nemotron_h", torch.bfloat16),
    ("gpt_oss", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_small_matrices_are_predicted_truly(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_WEIGHTS", 400)  # about 10 rows a block
    monkeypatch.setattr(outputs, "ENERGY_STEP", 50)
    codecs = codecs_of(TERMS)
    with open_source(make(name, dtype, tmp_path)) as source:
        groups = list(layers_of(source).values())[-1]
        states = random_states(1, 0, 9, groups["up"].shape[1])
        prediction = LayerPrediction(groups, source.activation, states, codecs, SEED, exact_bytes=True)
        found = predict(source, groups, MeanBase(), prediction)
        every = dict.fromkeys([label for label, _ in groups["up"].members], states)
        assert_alike(found, reference(source, groups, MeanBase(), every, codecs, SEED))
        for label, error in prediction.base_errors().items():
            assert error == pytest.approx(base_error(source, groups, label, states.astype(np.float64)), rel=TOLERANCE)


def base_error(source: Source, groups, label: str, states: np.ndarray) -> float:
    """|y_mean - y| / |y| of one expert."""
    weights: list[dict] = [{}, {}]
    for p, group in groups.items():
        experts, mean = whole(source, group, MeanBase())
        own = experts[[one for one, _ in group.members].index(label)]
        for one, bits in zip(weights, (own, mean), strict=True):
            one[p] = floats.widen(bits, group.dtype).astype(np.float64)
    y, y_mean = (ffn(source, one, states) for one in weights)
    return float(np.linalg.norm(y_mean - y) / np.linalg.norm(y))


def test_states_and_labels_of_their_own(tmp_path: Path) -> None:
    codecs = codecs_of(["int2", "drop0.8"])
    with open_source(make("mixed", torch.bfloat16, tmp_path)) as source:
        groups = layers_of(source)["model.layers.1.mlp.experts"]
        states = {str(i): random_states(i, 0, 4 + i, groups["up"].shape[1]) for i in (0, 2)}
        expected = reference(source, groups, ExpertBase(1), states, codecs, SEED)
        prediction = LayerPrediction(groups, source.activation, states, codecs, SEED, labels=["0", "2"])
        assert_alike(predict(source, groups, ExpertBase(1), prediction), expected)


def test_an_expert_without_tokens_has_no_output_errors(tmp_path: Path) -> None:
    with open_source(make("mixed", torch.bfloat16, tmp_path)) as source:
        groups = layers_of(source)["model.layers.0.mlp.experts"]
        states = random_states(0, 0, 5, groups["up"].shape[1])
        prediction = LayerPrediction(
            groups, source.activation, {"0": states, "2": states[:0]}, codecs_of(["int4"]), SEED
        )
        found = predict(source, groups, MeanBase(), prediction)
        for label in ("1", "2"):
            one = found["up"][label]["int4"]
            assert math.isnan(one.output_error) and math.isnan(one.output_delta_error) and 0 < one.delta_error < 1
        assert found["up"]["0"]["int4"].output_error > 0


@pytest.mark.parametrize("states", [None, np.zeros((0, toy.HIDDEN), np.float32)], ids=["none", "empty"])
def test_without_states_weights_alone(states, tmp_path: Path) -> None:
    with open_source(make("mixed", torch.bfloat16, tmp_path)) as source:
        groups = layers_of(source)["model.layers.0.mlp.experts"]
        found = predict(source, groups, MeanBase(), LayerPrediction(groups, "silu", states, codecs_of(["int4"]), SEED))
        x = random_states(0, 0, 3, toy.HIDDEN)
        with_states = predict(source, groups, MeanBase(), LayerPrediction(groups, "silu", x, codecs_of(["int4"]), SEED))
        one, other = found["down"]["1"]["int4"], with_states["down"]["1"]["int4"]
        assert (one.bytes, one.weight_error, one.kept) == (other.bytes, other.weight_error, other.kept)
        assert math.isnan(one.output_error) and math.isnan(one.output_delta_error)


def test_a_layer_without_down(tmp_path: Path) -> None:
    with open_source(make("mixed", torch.bfloat16, tmp_path)) as source:
        groups = {p: g for p, g in layers_of(source)["model.layers.0.mlp.experts"].items() if p != "down"}
        x = random_states(0, 0, 3, toy.HIDDEN)
        found = predict(source, groups, MeanBase(), LayerPrediction(groups, "silu", x, codecs_of(["int4"]), SEED))
        assert list(found) == ["gate", "up"]
        assert found["up"]["0"]["int4"].delta_error > 0 and math.isnan(found["up"]["0"]["int4"].output_error)


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_as_the_command_measures_it(projection: str, tmp_path: Path) -> None:
    model, out = make("mixed", torch.bfloat16, tmp_path / "model"), tmp_path / "out"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"delta: exact\nseed: {SEED}\nrules:\n  - projections: [{projection}]\n    delta: ternary0.2\n")
    done("compress", model, "--recipe", recipe, "-o", out)
    measured = done("verify", out, "--against", model, "--seed", SEED, "--tokens", 7, "--json").json["experts"]
    with open_source(model) as source:
        for name, groups in layers_of(source).items():
            states = random_states(SEED, groups["up"].layer, 7, groups["up"].shape[1])
            prediction = LayerPrediction(groups, source.activation, states, codecs_of(["ternary0.2"]), SEED)
            found = predict(source, groups, MeanBase(), prediction)[projection]
            for one in (m for m in measured if m["group"] == f"{name}.{projection}_proj"):
                predicted = found[one["expert"]]["ternary0.2"]
                # fp32 products of verify: 6e-8 of |y|, where the error is some 1e-2 of it
                assert predicted.output_error == pytest.approx(one["output"], rel=1e-4)
                assert predicted.output_delta_error == pytest.approx(one["output_delta"], rel=1e-4)
                assert predicted.delta_error == pytest.approx(one["delta"], rel=1e-5)
                assert predicted.kept == pytest.approx(one["kept"], rel=1e-5)


# --- samples


def test_every_row_is_as_likely() -> None:
    samples = [Sample(seed, "x", 101, 20, 1 << 13) for seed in range(2000)]  # runs of 4 rows, the last shorter
    times = np.bincount(np.concatenate([sample.rows for sample in samples]), minlength=101)
    share = np.mean([sample.rows.size for sample in samples]) / 101
    expected, deviation = 2000 * share, math.sqrt(2000 * share * (1 - share))
    assert np.abs(times - expected).max() < 5 * deviation  # 101 rows: a chance of 1e-4
    assert all(sample.scale == 101 / sample.rows.size for sample in samples)


@pytest.mark.parametrize(
    ("count", "wanted", "width"), [(1, 1, 1), (7, 256, 8), (300, 64, 8), (999, 128, 4096), (40, 3, 1 << 16)]
)
@pytest.mark.parametrize("step", [1, 10, 1000])
def test_runs_of_blocks_are_the_sample(count: int, wanted: int, width: int, step: int) -> None:
    sample = Sample(0, "x", count, wanted, width)
    seen = []
    for begin in range(0, count, step):
        for rows, places in sample.within(slice(begin, min(count, begin + step))):
            assert begin <= rows.start < rows.stop <= begin + step
            assert (sample.rows[places] == np.arange(rows.start, rows.stop)).all()
            seen += range(rows.start, rows.stop)
    assert seen == sample.rows.tolist() and len(set(seen)) == len(seen)
    assert len(seen) == count if wanted >= count else abs(len(seen) - wanted) <= max(1, wanted // 2)


def test_samples_differ_by_seed_and_matrix() -> None:
    rows = [tuple(Sample(seed, name, 500, 50, 8192).rows) for seed, name in ((0, "a"), (1, "a"), (0, "b"), (0, "a"))]
    assert rows[0] == rows[3] and len(set(rows)) == 3


def synthetic(inner: int, hidden: int, experts: int, random: np.random.Generator, spread: float = 1e-3):
    """Groups and the whole stored bf16 matrices (experts, base) of a layer; nothing on a disk."""
    groups, bits = {}, {}
    for p, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
        members = tuple((str(i), MatrixView("", shape, 0, shape[1], 1)) for i in range(experts))
        groups[p] = ExpertGroup(f"model.layers.0.mlp.experts.{p}_proj", 0, p, "BF16", members)
        base = random.standard_normal(shape, np.float32) / math.sqrt(shape[1])
        own = [base + spread * random.standard_normal(shape, np.float32) for _ in range(experts)]
        bits[p] = [floats.narrow(w, "BF16") for w in own], floats.narrow(base, "BF16")
    return groups, bits


def shown(prediction, groups, bits, step: int) -> dict:
    """What is found in blocks of `step` rows."""
    for p, group in groups.items():
        experts, base = bits[p]
        for begin in range(0, group.shape[0], step):
            rows = slice(begin, min(group.shape[0], begin + step))
            prediction.add(Block(group, rows, [expert[rows] for expert in experts], base[rows]))
    return prediction.found()


def test_sampled_errors_are_right_in_the_mean() -> None:
    random = np.random.default_rng(0)
    groups, bits = synthetic(600, 320, 2, random)
    codecs, states = codecs_of(["int2", "drop0.9"]), random.standard_normal((16, 320), np.float32)
    truth = shown(LayerPrediction(groups, "silu", states, codecs, SEED, 600), groups, bits, 600)
    samples = [
        shown(LayerPrediction(groups, "silu", states, codecs, seed, 64), groups, bits, 600) for seed in range(30)
    ]
    for projection in groups:
        for term in ("int2", "drop0.9"):
            for name in ("output_error", "output_delta_error", "delta_error", "weight_error"):
                energies = [getattr(found[projection]["1"][term], name) ** 2 for found in samples]
                mean, error = np.mean(energies), np.std(energies) / math.sqrt(len(energies))
                true = getattr(truth[projection]["1"][term], name) ** 2
                # beside chance, other seeds draw other errors: some per cent in 16 tokens
                assert abs(mean - true) < 4 * error + 0.03 * true, (projection, term, name)
                assert 0 < error < 0.1 * true


def test_blocks_and_threads_do_not_matter(monkeypatch) -> None:
    monkeypatch.setattr(exact, "CHUNK_WEIGHTS", 900)  # 22 rows of 40: chunks and blocks overlap any way
    groups, bits = synthetic(97, 40, 3, np.random.default_rng(1))
    states = np.random.default_rng(2).standard_normal((5, 40), np.float32)
    codecs = codecs_of(["int1", "ternary0.1", "drop0.9", "exact"])
    found = [
        shown(LayerPrediction(groups, "silu", states, codecs, 0, rows=16, exact_bytes=True), groups, bits, step)
        for step in (1000, 22, 7)
    ]
    assert_alike(found[1], found[0], 1e-6)  # BLAS adds blocks of another size in another order
    assert_alike(found[2], found[0], 1e-6)
    codec, (experts, base) = parse_codec("exact", 16), bits["up"]
    rows = codec.block_rows((97, 40))
    true = sum(
        codec.encode_expert(experts[1][r : r + rows], base[r : r + rows], "BF16", 0, r)["stream"].nbytes
        for r in range(0, 97, rows)
    )
    assert found[2]["up"]["1"]["exact"].bytes == true + 16 * -(-97 // rows)


def test_exact_bytes_are_not_known_where_nothing_counted_them() -> None:
    groups, bits = synthetic(9, 8, 2, np.random.default_rng(0))
    found = shown(LayerPrediction(groups, "silu", None, codecs_of(["exact"]), 0), groups, bits, 9)
    assert found["up"]["0"]["exact"] == Predicted(None, 0.0, 0.0, 1.0, 0.0, 0.0)


# --- what is not as it should be


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_give_no_numbers(bad: float) -> None:
    groups, bits = synthetic(20, 16, 2, np.random.default_rng(0))
    bits["up"][0][1][3, 4] = floats.narrow(np.array([bad], np.float32), "BF16")[0]
    states = np.random.default_rng(2).standard_normal((5, 16), np.float32)
    found = shown(LayerPrediction(groups, "silu", states, codecs_of(["int4", "none", "exact"]), 0), groups, bits, 8)
    for term in ("int4", "none"):
        one = found["up"]["1"][term]
        assert one.bytes is not None and all(math.isnan(value) for name, value in vars(one).items() if name != "bytes")
        assert math.isnan(found["gate"]["1"][term].output_error) and found["gate"]["1"][term].delta_error >= 0
        assert all(math.isfinite(value) for value in vars(found["up"]["0"][term]).values())
    assert found["up"]["1"]["exact"].output_error == 0


@pytest.mark.parametrize("where", ["expert", "base"])
def test_rows_that_are_not_sampled_are_looked_at_too(where: str) -> None:
    groups, bits = synthetic(80, 16, 2, np.random.default_rng(0), spread=0.01)
    states = np.random.default_rng(2).standard_normal((5, 16), np.float32)
    prediction = LayerPrediction(groups, "silu", states, codecs_of(["int4", "exact"]), 0, rows=4)
    row = next(row for row in range(16) if row not in prediction._places.rows)
    (bits["down"][0][1] if where == "expert" else bits["down"][1])[row, 4] = 0x7FC0
    found = shown(prediction, groups, bits, 8)
    lost = {"1"} if where == "expert" else {"0", "1"}
    for label in "01":
        assert prediction.finite("down", label) == (label not in lost) and prediction.finite("up", label)
        one = found["down"][label]["int4"]
        assert [math.isnan(value) for name, value in vars(one).items() if name != "bytes"] == [label in lost] * 5
        assert found["down"][label]["exact"].output_error == 0
        assert where == "expert" or 0 < found["up"][label]["int4"].output_error < 1  # of its own finite matrices


def test_what_a_codec_refuses_is_not_free() -> None:
    """All is finite, but mean|d| / density is past what ternary's scales hold."""
    groups, bits = synthetic(20, 16, 1, np.random.default_rng(0))
    bits["down"][0][0][3] = floats.narrow(np.full(20, 1e38, np.float32), "BF16")
    states = np.full((2, 16), 1e-10, np.float32)  # of which the outputs are finite
    found = shown(LayerPrediction(groups, "silu", states, codecs_of(["ternary0.1", "exact"]), 0), groups, bits, 8)
    assert math.isnan(found["down"]["0"]["ternary0.1"].output_error)
    assert found["down"]["0"]["exact"].output_error == 0


def test_experts_that_equal_their_base() -> None:
    groups, bits = synthetic(20, 16, 1, np.random.default_rng(0), spread=0)
    states = np.random.default_rng(2).standard_normal((5, 16), np.float32)
    found = shown(
        LayerPrediction(groups, "silu", states, codecs_of(["int4", "ternary0.1", "none"]), 0), groups, bits, 8
    )
    for p in groups:
        for one in found[p]["0"].values():
            assert (one.weight_error, one.delta_error, one.kept, one.output_error, one.output_delta_error) == (
                0,
                0,
                1,
                0,
                0,
            )


def test_values_past_the_range_of_the_dtype() -> None:
    groups, bits = synthetic(20, 16, 2, np.random.default_rng(0))
    bits["up"][0][1][3] = floats.narrow(np.full(16, 3e38, np.float32), "BF16")
    found = shown(
        LayerPrediction(groups, "silu", np.ones((2, 16), np.float32), codecs_of(["int4", "drop0.9"]), 0),
        groups,
        bits,
        8,
    )
    assert math.isnan(found["up"]["1"]["drop0.9"].delta_error) and math.isnan(found["up"]["1"]["drop0.9"].output_error)


@pytest.mark.parametrize("term", ["rank4", "int1+rank4", "sparse0.9"])
def test_codecs_of_whole_matrices_are_refused(term: str) -> None:
    groups, _ = synthetic(20, 16, 2, np.random.default_rng(0))
    with pytest.raises(UsageError, match="takes whole matrices"):
        LayerPrediction(groups, "silu", None, codecs_of([term]), 0)


def test_memory_is_bounded() -> None:
    random = np.random.default_rng(0)
    shapes = {"gate": (1024, 64), "up": (1024, 64), "down": (64, 1024)}
    groups = {
        p: ExpertGroup(
            f"model.layers.0.mlp.experts.{p}_proj",
            0,
            p,
            "BF16",
            tuple((str(i), MatrixView("", shape, 0, shape[1], 1)) for i in range(512)),
        )
        for p, shape in shapes.items()
    }
    states, codecs = random.standard_normal((64, 64), np.float32), codecs_of(TERMS)
    tracemalloc.start()  # numpy tells it of every array
    try:
        prediction = LayerPrediction(groups, "silu", states, codecs, 0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # h and changes, each less than its bound by what does not divide, and Python's own objects: a group has 512 members
    assert 1.8 * HELD_BYTES < held < 2.1 * HELD_BYTES and prediction.found().keys() == groups.keys()


def test_combined() -> None:
    assert combined([3.0, 4.0]) == 5 and combined([]) == 0 and math.isnan(combined([1.0, math.nan]))
