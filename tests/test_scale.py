"""A model of very many tensors is planned from its headers, in steps that grow with their number and no faster."""

import collections
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from command import ROOT, contents, ders, done

from ders_cli import convert, describe
from ders_cli.checkpoint import manifest
from ders_cli.checkpoint.reader import CheckpointReader
from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.checkpoint.writer import ShardWriter, header_text
from ders_cli.errors import CheckpointError
from ders_cli.output import Options
from ders_cli.recipe import make_recipe
from ders_cli.source import open_source

HIDDEN, INNER = 64, 48


def headers_only(folder: Path, layers: int, experts: int, shards: int = 3) -> dict[str, TensorSpec]:
    """A checkpoint in qwen3_moe's form of which only headers are there: the weights are holes."""
    tensors = {"model.embed_tokens.weight": TensorSpec((101, HIDDEN), "BF16")}
    for layer in range(layers):
        at = f"model.layers.{layer}.mlp"
        tensors[f"{at}.gate.weight"] = TensorSpec((experts, HIDDEN), "BF16")
        for expert in range(experts):
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                tensors[f"{at}.experts.{expert}.{name}_proj.weight"] = TensorSpec(shape, "BF16")
    folder.mkdir()
    weight_map, names = {}, list(tensors)
    for number in range(shards):
        file, own = (
            f"model-{number + 1:05d}-of-{shards:05d}.safetensors",
            {n: tensors[n] for n in names[number::shards]},
        )
        text = header_text(own, None)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + sum(spec.nbytes for spec in own.values()))
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": experts}))
    return tensors


def planned(folder: Path, delta: str = "int4") -> dict:
    with open_source(folder) as source:
        return convert.prepare(source, make_recipe({"delta": delta}), folder.parent / "out", Options()).totals()


def test_plan_states_the_bytes_of_21000_tensors(tmp_path: Path) -> None:
    layers, experts = 7, 1000
    tensors = headers_only(tmp_path / "model", layers, experts)
    plan = planned(tmp_path / "model")
    assert plan["expert_bytes"] == layers * experts * 3 * HIDDEN * INNER * 2
    # int4 in groups of 128: half a byte an entry, and a bf16 scale a row, since rows are shorter than a group
    deltas = experts * (2 * INNER * (HIDDEN // 2 + 2) + HIDDEN * (INNER // 2 + 2))
    copied = sum(spec.nbytes for name, spec in tensors.items() if ".experts." not in name)
    known = layers * (3 * HIDDEN * INNER * 2 + deltas) + copied
    # beside tensors: headers, index and ders.json, which has 2 hashes, 5 errors and a name for each of 21,000 matrices
    assert 600 < (plan["output_bytes"] - known) / (layers * experts * 3) < 1100


def test_plan_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers_only(tmp_path / "model", 2, 10)

    def refuse(*_: object) -> None:
        raise AssertionError("a plan read weights")

    monkeypatch.setattr(CheckpointReader, "read_bytes", refuse)
    assert planned(tmp_path / "model")["expert_bytes"] > 0


def _calls(folder: Path, delta: str) -> int:
    """How many Python and C functions a plan calls."""
    counts: collections.Counter = collections.Counter()
    sys.setprofile(lambda frame, event, argument: counts.update([event]))
    try:
        planned(folder, delta)
    finally:
        sys.setprofile(None)
    return counts["call"] + counts["c_call"]


@pytest.mark.parametrize("delta", ["int4", "exact", "ternary0.02"])
@pytest.mark.parametrize(("small", "large"), [((2, 100), (2, 800)), ((40, 2), (320, 2))])
def test_plan_grows_with_the_tensors_and_no_faster(
    tmp_path: Path, delta: str, small: tuple[int, int], large: tuple[int, int]
) -> None:
    """`small`, `large`: layers and experts; the second has eight times the tensors."""
    headers_only(tmp_path / "small", *small)
    headers_only(tmp_path / "large", *large)
    planned(tmp_path / "small", delta)  # what is imported and cached once
    few, many = _calls(tmp_path / "small", delta), _calls(tmp_path / "large", delta)
    assert many < 8 * few
    if large == (2, 800):  # 114 a matrix: its entry in the header, its view, its member in ders.json
        assert many < 200 * 2 * 800 * 3


def test_looking_for_a_name_that_stands_twice_is_one_pass(tmp_path: Path) -> None:
    names = [f'"x{number}": {{}}' for number in range(200_000)]
    text = ("{" + ", ".join([*names, names[-1]]) + "}").encode()
    (tmp_path / "config.json").write_bytes(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="key 'x199999' stands twice"):  # by list.count this takes an hour
        CheckpointReader(tmp_path)


VALUES = (
    {},
    [],
    {"a": {}, "b": []},
    {"a": {"b": {"c": {"d": [1, [2, {"e": 'quote " and line\n end, ü'}]]}}}},
    {
        "groups": [{"name": "g", "members": [{"strides": [1, 2], "error": {"weight": -1.23456e-100}}] * 3}] * 2,
        "n": None,
    },
    {"deep": [[[]], [{}], [[[1.5, True, None]]]], "files": {"x": "0" * 64}},
)


@pytest.mark.parametrize("value", VALUES)
def test_text_bytes_is_the_length_of_the_text(value: object) -> None:
    assert manifest.text_bytes(value) == len(json.dumps(value, indent=1))
    assert "".join(manifest._indented(value)) == json.dumps(value, indent=1, sort_keys=True)


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_planned_bytes_of_groups_one_by_one(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [{"name": f"g{number}", "members": [{"label": "0", "offset": number}]} for number in range(count)]
    rest = {"format": 1, "source": {"files": {"a": ["b"]}}}
    whole = manifest.manifest_text(rest | {"groups": groups})
    assert manifest.planned_bytes(rest, iter(groups)) == -(-len(whole) // manifest.PAGE) * manifest.PAGE
    monkeypatch.setattr(manifest, "PAGE", 1)
    assert manifest.planned_bytes(rest, iter(groups)) == len(whole)


def test_a_model_whose_ders_json_could_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers_only(tmp_path / "model", 1, 20)
    monkeypatch.setattr(describe, "MAX_JSON_BYTES", 10_000)
    ran = ders("compress", tmp_path / "model", "--dry-run")
    assert ran.code == 4 and "ders.json would take" in ran.err and "60 matrices" in ran.err


def test_many_small_experts_there_and_back(tmp_path: Path) -> None:
    """What is planned in pieces is what is written: 1,500 matrices, to the byte."""
    folder, random = tmp_path / "model", np.random.default_rng(0)
    specs = {"model.embed_tokens.weight": TensorSpec((5, 8), "BF16")}
    for expert in range(500):
        for name in ("gate", "up", "down"):
            specs[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = TensorSpec((8, 8), "BF16")
    folder.mkdir()
    writer = ShardWriter(folder / "model.safetensors", specs)
    for name, spec in specs.items():
        writer.write(name, 0, random.integers(0x3F00, 0x3F40, spec.size).astype(np.uint16))
    writer.close()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 500}))
    plan = done("compress", folder, "--delta", "int4", "-o", tmp_path / "int4", "--json").json
    assert sum(map(len, contents(tmp_path / "int4").values())) == plan["plan"]["output_bytes"]
    done("verify", tmp_path / "int4", folder)
    done("compress", folder, "--delta", "exact", "-o", tmp_path / "exact", "-q")
    done("restore", tmp_path / "exact", "-o", tmp_path / "again", "-q")
    assert contents(tmp_path / "again") == contents(folder)


def test_frontier_models_have_the_published_sizes() -> None:
    """Parameters and tensors of docs/measure/frontier.py against what the models' pages and index files say."""
    sys.path.insert(0, str(ROOT / "docs" / "measure"))
    try:
        import frontier
    finally:
        sys.path.pop(0)
    found = {m.name: sum(map(frontier.nbytes, m.tensors())) for m in frontier.MODELS}
    # bytes in bf16: 140.6 B, 235.1 B and 1,026 B parameters; DeepSeek-V3 has 671 B and 11.5 B more in its MTP layer
    assert found["mixtral-8x22b"] == 281_241_268_224
    assert found["qwen3-235b-a22b"] == 470_187_269_120
    assert 682e9 < found["deepseek-v3"] / 2 < 686e9
    assert 1.02e12 < found["kimi-k2"] / 2 < 1.04e12


def test_frontier_estimates_follow_their_formula() -> None:
    sys.path.insert(0, str(ROOT / "docs" / "measure"))
    try:
        import frontier
    finally:
        sys.path.pop(0)
    assert frontier.estimate(rate=1.0, read=100, written=30, bandwidth=1, cores=16) == 130  # storage
    assert frontier.estimate(rate=8.0, read=100, written=30, bandwidth=20, cores=16) == 50  # cores
