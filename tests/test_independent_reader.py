"""docs/format.md is enough: the reader written from it alone gives what `ders restore` gives, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from blake3 import blake3
from independent_reader import draw, read_experts, read_tensors
from safetensors.torch import load_file
from typer.testing import CliRunner

from ders_cli.app import app

TERMS = (
    "exact int8 int5 int4 int3 int2 int1 drop0.9 drop0.5 ternary0.05 ternary0.5 top0.1 top0.5 2:4 3:7 rank4 sparse0.7 sparse0.99 none "
    "drop0.9+int4 top0.2+int4 2:4+int8 int1+rank4 drop0.5+drop0.5+int3 int1+sparse0.9"
).split()
DTYPES = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


@pytest.fixture(scope="module", params=DTYPES)
def source(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "moe"
    toy.make("mixtral", folder, dtype=getattr(torch, request.param), num_local_experts=4, intermediate_size=61)
    return folder


@pytest.mark.parametrize("term", TERMS)
def test_every_codec(source, tmp_path, term):
    check(source, tmp_path, "--delta", term, "--group-size", 16)  # the last group of a row has 8 or 13 inputs


@pytest.mark.parametrize("term", ["exact", "int1", "ternary0.2"])
def test_an_expert_that_is_the_base(source, tmp_path, term):
    """Its delta is 0: a scale of 0, and slots of ternary that nothing uses."""
    check(source, tmp_path, "--delta", term, "--base", "expert:0")


@pytest.mark.parametrize("term", ["exact", "drop0.5+int4"])
@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text", "dbrx"])
def test_packed_experts_and_shards(tmp_path, name, term):
    toy.make(name, tmp_path / "moe", dtype=torch.bfloat16, fused=True)
    check(tmp_path / "moe", tmp_path, "--delta", term, "--max-shard-size", "20KB", "--seed", 7)
    assert len(list(tmp_path.glob("ders/*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_takes_any_bits(tmp_path, dtype):
    """Experts near the base, far from it and of random bits are chunks of modes 1, 2 and 0; all have some odd weights.

    A weight of random bits makes signs differ, so that the difference of the keys wraps around, and can be a NaN.
    """
    random = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": torch.ones(61, 40)}
    for name, shape in (("w1", (61, 40)), ("w2", (40, 61)), ("w3", (61, 40))):
        base, odd = random.normal(size=shape), random.random((4, *shape)) < np.reshape([0.02, 0.02, 0, 1], (4, 1, 1))
        matrices = np.stack([base, base * (1 + 0.01 * random.normal(size=shape)), *random.normal(size=(2, *shape))])
        bits = torch.tensor(matrices, dtype=getattr(torch, dtype)).view(getattr(torch, DTYPES[dtype].__name__)).numpy()
        bits = np.where(odd, random.integers(0, np.iinfo(bits.dtype).max, bits.shape, bits.dtype, endpoint=True), bits)
        for i, matrix in enumerate(torch.from_numpy(bits).view(getattr(torch, dtype))):
            tensors[f"model.layers.0.block_sparse_moe.experts.{i}.{name}.weight"] = matrix
    config = dict(
        model_type="mixtral",
        hidden_size=40,
        intermediate_size=61,
        num_hidden_layers=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        hidden_act="silu",
    )
    toy.write(tmp_path / "moe", config, tensors | {"model.layers.0.block_sparse_moe.gate.weight": torch.ones(4, 40)})
    check(tmp_path / "moe", tmp_path, "--delta", "exact", "--base", "expert:0")
    stored = read_tensors(tmp_path / "ders")
    extents = [name for name in stored if name.endswith(".delta.extents")]
    modes = {stored[name.replace("extents", "stream")][at] for name in extents for at in stored[name][..., 0].flat}
    assert modes == {0, 1, 2}


def test_philox_known_answer():
    assert [f"{word:08x}" for word in draw(4, key=0)] == "6627e8d5 e169c58d bc57ac4c 9b00dbd8".split()


def check(source: Path, tmp_path: Path, *options) -> None:
    """Convert `source` and restore it; compare the reader's experts with the restored tensors and the hashes."""
    converted, restored = tmp_path / "ders", tmp_path / "restored"
    run("compress", source, *options, "-o", converted)
    run("restore", converted, "-o", restored)
    experts, tensors = read_experts(converted), {}
    for file in restored.glob("*.safetensors"):
        tensors |= load_file(file)
    groups = json.loads((converted / "ders.json").read_text())["groups"]
    places = {(group["name"], member["label"]): (group, member) for group in groups for member in group["members"]}
    assert experts.keys() == places.keys() and places
    for key, (group, member) in places.items():
        tensor = tensors[member["tensor"]]
        expert = tensor.flatten().as_strided(group["shape"], member["strides"], member["offset"]).contiguous()
        bits = expert.view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()
        np.testing.assert_array_equal(experts[key], bits, err_msg=str(key), strict=True)
        assert blake3(experts[key].tobytes()).hexdigest() == member["restored_hash"], key


def run(*arguments) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
