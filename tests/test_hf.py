"""The transformers plug-in: packed models compute what the restored checkpoint does, train, and are saved as valid folders."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
import toy
import transformers
from command import contents, ders, done
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import ders_cli.hf as hf
from ders_cli.checkpoint.writer import ShardWriter
from ders_cli.errors import CheckpointError, UnsupportedError, UsageError
from ders_cli.hf.stock import STACKED
from ders_cli.runtime.projection import WEIGHTS

OWN_WAY = ("jetmoe", "llama4_text", "dbrx")  # their experts modules are called in ways of their own
COMMON = [name for name in toy.MODELS if name not in OWN_WAY]
DELTAS = ("exact", "int4", "int1", "drop0.9", "ternary0.02", "rank16", "2:4", "sparse0.9", "top0.1", "drop0.5+int4")
TOKENS = torch.arange(1, 17).reshape(2, 8)
# fp32 sums in another order than the stock model's; measured 1e-7. Experts without their deltas: 1e-3 and more.
CLOSE = 1e-6


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(TOKENS).logits


def load(folder: Path, **arguments):
    """The model, which must load without any remark."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    return model


def stock(folder: Path, **arguments):
    return load(folder, experts_implementation="eager", **arguments)


def compress(source: Path, delta: str, out: Path, *more: object) -> Path:
    done("compress", source, "--delta", delta, "--group-size", 32, "-o", out, "-q", *more)
    return out


def restore(packed: Path, out: Path) -> Path:
    done("restore", packed, "-o", out, "-q")
    return out


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith("model")}


def manifest(folder: Path) -> dict:
    return json.loads((folder / "ders.json").read_text())


# --- loading


@pytest.mark.parametrize("name", COMMON)
def test_packed_is_the_restored_model(tmp_path: Path, name: str) -> None:
    """Every architecture: nothing missing or unexpected, the restored model's logits; saved untouched, the same bytes."""
    source, again = tmp_path / "source", tmp_path / "again"
    toy.make(name, source)
    packed = compress(source, "int4", tmp_path / "packed")
    model, plain = load(packed), restore(packed, tmp_path / "plain")
    want = logits(stock(plain))
    assert (logits(model) - want).abs().max() < CLOSE
    assert (logits(load(compress(source, "none", tmp_path / "none"))) - want).abs().max() > 100 * CLOSE

    model.save_pretrained(again)
    assert weights(again) == weights(packed)
    assert manifest(again)["groups"] == manifest(packed)["groups"]
    done("verify", again, "-q")
    assert weights(restore(again, tmp_path / "plain2")) == weights(plain)
    assert torch.equal(logits(stock(tmp_path / "plain2")), want)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    # transformers keeps some of nemotron_h's tensors in fp32 whatever the file says, and saves them so
    [("mixtral", torch.bfloat16), ("gpt_oss", torch.bfloat16), ("nemotron_h", torch.float32)],
)
def test_every_codec(tmp_path: Path, name: str, dtype: torch.dtype, delta: str) -> None:
    """Saved untouched, the same bytes; in fp32, the restored model's logits up to the rounding of its weights."""
    source = tmp_path / "source"
    toy.make(name, source, dtype=dtype)
    toy.reshard(source, 2)
    packed = compress(source, delta, tmp_path / "packed", "--max-shard-size", "20KB")
    model = load(packed)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(weights(packed)) >= 3  # two shards and an index
    assert weights(tmp_path / "again") == weights(packed)

    wide, plain = load(packed, dtype=torch.float32), stock(restore(packed, tmp_path / "plain"), dtype=torch.float32)
    # the restored weights are rounded to bf16, those in memory are not: measured up to 2.5e-3; without deltas 2e-2 and more
    assert (logits(wide) - logits(plain)).abs().max() < 4e-3
    wide.save_pretrained(tmp_path / "wide")
    done("verify", tmp_path / "wide", "-q")
    assert (logits(stock(restore(tmp_path / "wide", tmp_path / "plain2"))) - logits(wide)).abs().max() < CLOSE
    files = [toy.load_file(file) for file in (tmp_path / "plain2").glob("*.safetensors")]
    total = json.loads((tmp_path / "plain2" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for file in files for tensor in file.values())


@pytest.mark.parametrize("name", toy.MODELS)
def test_dequantized_is_the_stock_model(tmp_path: Path, name: str) -> None:
    """Every architecture: the stock classes, bit for bit what restore gives, saved as a stock checkpoint."""
    source = tmp_path / "source"
    toy.make(name, source)
    packed = compress(source, "int4", tmp_path / "packed")
    if name in OWN_WAY:
        with pytest.raises(UnsupportedError, match='"dequantize": true.*ders restore'):
            load(packed)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["dequantize"] = True
    (packed / "config.json").write_text(json.dumps(config))
    model, plain = stock(packed), stock(restore(packed, tmp_path / "plain"))
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    found, expected = model.state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits(model), logits(plain))

    model.save_pretrained(tmp_path / "again")
    plain.save_pretrained(tmp_path / "stock")
    assert weights(tmp_path / "again") == weights(tmp_path / "stock")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_dequantize_by_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    toy.make("qwen2_moe", source)
    packed = compress(source, "int4", tmp_path / "packed")
    monkeypatch.setenv("DERS_DEQUANTIZE", "1")
    with torch.inference_mode():  # threads fill the experts, and each has a mode of its own
        assert stock(packed).model.layers[0].mlp.experts.down_proj.any()
    assert type(stock(packed).model.layers[0].mlp.experts).__name__ == "Qwen2MoeExperts"
    monkeypatch.setenv("DERS_DEQUANTIZE", "0")
    assert isinstance(load(packed).model.layers[0].mlp.experts, hf.load.HfExperts)


@pytest.mark.parametrize("name", ["qwen2_moe", "granitemoeshared", "llama4_text"])
def test_shared_expert_in_a_group(tmp_path: Path, name: str) -> None:
    """Not packed, with a sentence; dequantised it is the stock model."""
    source = tmp_path / "source"
    toy.make(name, source)
    packed = compress(source, "int4", tmp_path / "packed", "--shared")
    with pytest.raises(UnsupportedError, match="shared expert.*dequantize"):
        load(packed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DERS_DEQUANTIZE", "1")
        model = stock(packed)
    assert torch.equal(logits(model), logits(stock(restore(packed, tmp_path / "plain"))))


def test_damaged_expert_is_not_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    toy.make("mixtral", source)
    packed = compress(source, "int4", tmp_path / "packed")
    tensors = toy.load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.experts.up_proj.delta.codes"][2, 3, 4] ^= 1
    toy.save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("DERS_DEQUANTIZE", "1")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.up_proj, expert 2: .*ders verify"):
        stock(packed)


def _mapped_files(model, folder: Path) -> set[str]:
    """Names of the experts' tensors that do not lie in a mapping of the checkpoint's files."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            begin, end = line.split()[0].split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    own = {name: t.data_ptr() for name, t in model.state_dict().items() if ".experts." in name}
    return {name for name, at in own.items() if not any(begin <= at < end for begin, end in ranges)}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_one_tensor_is_one_parameter(tmp_path: Path) -> None:
    """Names on disk are keys of the state dict, and nothing is copied: parameters lie in the mapped file."""
    source = tmp_path / "source"
    toy.make("gpt_oss", source, dtype=torch.bfloat16)
    packed = compress(source, "int4", tmp_path / "packed")
    model, stored = load(packed), toy.load_file(packed / "model.safetensors")
    assert model.state_dict().keys() | set(manifest(packed)["guards"]) == stored.keys()
    assert _mapped_files(model, packed) == set()


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fetches the files that it knows; ders.json is fetched to stand beside them, of the same commit."""
    snapshot = tmp_path / "cache" / "models--me--moe" / "snapshots" / ("a" * 40)
    toy.make("mixtral", tmp_path / "source")
    shutil.copytree(compress(tmp_path / "source", "int4", tmp_path / "packed"), snapshot)
    (snapshot / "ders.json").unlink()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    asked = []

    def fetch(name: str, file: str, cache_dir: Path, revision: str, **_: object) -> None:
        asked.append((name, file, cache_dir, revision))
        shutil.copy(tmp_path / "packed" / file, snapshot / file)

    monkeypatch.setattr(hf.load, "cached_file", fetch)
    model = AutoModelForCausalLM.from_pretrained("me/moe", cache_dir=tmp_path / "cache", local_files_only=True)
    assert asked == [("me/moe", "ders.json", tmp_path / "cache", snapshot.name)]
    assert torch.equal(logits(model), logits(load(tmp_path / "packed")))


def test_layers_that_the_class_does_not_load(tmp_path: Path) -> None:
    """Layers for multi-token prediction: left out as stock loading leaves them out, and not saved."""
    source = tmp_path / "source"
    toy.make("qwen3_next", source)
    tensors = toy.load_file(source / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.0.mlp.experts.")}
    tensors |= {name.replace("model.", "mtp.", 1): tensor.clone() for name, tensor in own.items()}
    toy.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    packed = compress(source, "int4", tmp_path / "packed")
    model = load(packed)
    model.save_pretrained(tmp_path / "again")
    done("verify", tmp_path / "again", "-q")
    plain = restore(tmp_path / "again", tmp_path / "plain")
    assert not [name for name in toy.load_file(plain / "model.safetensors") if "mtp" in name]
    assert (logits(stock(plain)) - logits(model)).abs().max() < CLOSE


def test_dtypes(tmp_path: Path) -> None:
    """By default as stored; fp32 on request, but never what isn't float."""
    source = tmp_path / "source"
    toy.make("mixtral", source, dtype=torch.bfloat16)
    packed = compress(source, "int1+rank2", tmp_path / "packed")
    for asked, floats in (({}, torch.bfloat16), ({"dtype": torch.float32}, torch.float32)):
        up = load(packed, **asked).model.layers[0].mlp.experts.up_proj
        found = {name: parameter.dtype for name, parameter in up.named_parameters()}
        assert found == {
            "base": floats,
            "delta.codes": torch.uint8,
            "delta.scale": floats,
            "delta.then.left": floats,
            "delta.then.right": floats,
        }
    toy.make("mixtral", tmp_path / "wide")
    found = load(compress(tmp_path / "wide", "rank2", tmp_path / "packed2")).model.layers[0].mlp.experts.up_proj
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}  # though factors are BF16 on disk


def test_multimodal_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with a prefix before the decoder's, `model.language_model.layers`: packed, saved, dequantised."""
    text = toy.QWEN | dict(
        num_experts=3, rope_parameters=dict(rope_type="default", mrope_section=[2, 2, 1], rope_theta=1e4)
    )
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=toy.HIDDEN, patch_size=4)
    vision |= dict(temporal_patch_size=1, deepstack_visual_indexes=[0], num_position_embeddings=16)
    model_class = transformers.Qwen3VLMoeForConditionalGeneration
    model = model_class(transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for _, matrices in toy.experts(model):
            matrices.copy_(0.3 * torch.randn(matrices.shape[1:]) + 0.01 * torch.randn(matrices.shape))
    model.save_pretrained(tmp_path / "source")
    packed = compress(tmp_path / "source", "int4", tmp_path / "packed")
    plain = restore(packed, tmp_path / "plain")
    want = logits(model_class.from_pretrained(plain, experts_implementation="eager"))

    model, report = model_class.from_pretrained(packed, output_loading_info=True)
    assert not any(report.values()), report
    assert (logits(model) - want).abs().max() < CLOSE
    model.save_pretrained(tmp_path / "again")
    assert weights(restore(tmp_path / "again", tmp_path / "plain2")) == weights(plain)
    monkeypatch.setenv("DERS_DEQUANTIZE", "1")
    assert torch.equal(logits(model_class.from_pretrained(packed, experts_implementation="eager")), want)


def test_generates_what_the_restored_model_does(tmp_path: Path) -> None:
    source = tmp_path / "source"
    toy.make("mixtral", source)
    packed = compress(source, "int4", tmp_path / "packed")
    plain = stock(restore(packed, tmp_path / "plain"))
    settings = dict(max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(TOKENS))
    found, expected = (model.generate(TOKENS, **settings) for model in (load(packed), plain))
    assert found.shape[1] > 20  # no early end for both
    assert torch.equal(found, expected)


def test_without_head_and_with_another(tmp_path: Path) -> None:
    """AutoModel, whose names have no `model.`, and a classifier, which has a tensor more: both saved and loaded again."""
    source = tmp_path / "source"
    toy.make("mixtral", source)
    packed = compress(source, "int4", tmp_path / "packed")
    bare = AutoModel.from_pretrained(packed).eval()
    with torch.inference_mode():
        want = bare(TOKENS).last_hidden_state
    assert torch.equal(want, load(packed).model(TOKENS).last_hidden_state)
    bare.save_pretrained(tmp_path / "bare")
    done("verify", tmp_path / "bare", "-q")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "bare")(TOKENS).last_hidden_state, want)

    classifier = AutoModelForSequenceClassification.from_pretrained(packed, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    plain = restore(tmp_path / "classifier", tmp_path / "plain")
    again = AutoModelForSequenceClassification.from_pretrained(plain, experts_implementation="eager")
    assert (logits(again) - logits(classifier)).abs().max() < CLOSE


def test_copies_have_their_own_biases(tmp_path: Path) -> None:
    """A deep copy does not reach back to the model it was made of."""
    source = tmp_path / "source"
    toy.make("gpt_oss", source)
    model = load(compress(source, "int4", tmp_path / "packed"))
    twin, before = copy.deepcopy(model), logits(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.experts.down_proj_bias.add_(1)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    twin.save_pretrained(tmp_path / "twin")
    assert torch.equal(logits(load(tmp_path / "twin")), logits(twin))


# --- training


def trained(model, folder: Path, steps: int = 3, **arguments):
    """A Trainer after a few steps of next-token training."""
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    data = [{"input_ids": TOKENS.reshape(-1).roll(i), "labels": TOKENS.reshape(-1).roll(i)} for i in range(16)]
    trainer = Trainer(model=model, args=settings, train_dataset=data)
    return trainer


FACTORS = {"delta.left", "delta.right"}


@pytest.mark.parametrize(
    ("delta", "moving", "close"),
    [
        ("rank4", {"base"} | FACTORS, CLOSE),
        ("sparse0.9", {"base", "delta.values"}, CLOSE),
        ("int4", {"base"}, CLOSE),
        ("exact", set(), CLOSE),
        # values are stored in bf16: relative 2^-9 of a delta trained by 3e-2; measured 1e-4
        ("drop0.9", {"base", "delta.values"}, 2e-3),
    ],
)
def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delta: str, moving: set[str], close: float) -> None:
    """Trainer takes the model and trains what trains; the saved folder verifies, restores, and converts further."""
    source, out = tmp_path / "source", tmp_path / "trained"
    toy.make("mixtral", source, dtype=torch.bfloat16)
    model = load(compress(source, delta, tmp_path / "packed"), dtype=torch.float32)
    model.gradient_checkpointing_enable()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trained(model, tmp_path / "run")
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name.split("_proj.")[1] for name in changed if "experts." in name} == moving
    assert "lm_head.weight" in changed

    said: list[str] = []
    monkeypatch.setattr(hf.save.logger, "warning_once", said.append)
    trainer.save_model(out)
    assert bool(said) == (delta == "drop0.9")  # values are rounded
    done("verify", out, "-q")
    found = manifest(out)
    assert {group["dtype"] for group in found["groups"]} == {"BF16" if delta == "exact" else "F32"}
    members = [member for group in found["groups"] for member in group["members"]]
    assert all(member["source_hash"] == member["restored_hash"] for member in members)
    want = logits(model)
    assert (logits(load(out)) - want).abs().max() < close
    assert (logits(stock(restore(out, tmp_path / "plain"))) - want).abs().max() < close
    done("verify", out, "--against", tmp_path / "plain", "-q")
    done("verify", compress(out, "int4", tmp_path / "int4"), "--against", tmp_path / "plain", "-q")


def test_training_resumes(tmp_path: Path) -> None:
    """Four steps, and two that are saved and continued, give the same model: the router too, whose name on disk differs."""
    source = tmp_path / "source"
    toy.make("mixtral", source)
    packed = compress(source, "rank4", tmp_path / "packed")
    whole = load(packed)
    trained(whole, tmp_path / "whole", 4, lr_scheduler_type="constant").train()
    first = trained(load(packed), tmp_path / "run", 2, lr_scheduler_type="constant")
    first.train()
    first._save_checkpoint(first.model, trial=None)
    rest = load(packed)
    trained(rest, tmp_path / "run", 4, lr_scheduler_type="constant").train(resume_from_checkpoint=True)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, rest.get_parameter(name)), name


@pytest.mark.parametrize("flags", [("--rank", 4), ("--sparse", 0.9), ("--rank", 4, "--split", 2)], ids=str)
def test_upcycled_model(tmp_path: Path, flags: tuple) -> None:
    """`ders upcycle` to Trainer to a folder: at first the dense model; trained, its experts differ; it restores as trained."""
    toy.dense(tmp_path / "dense", intermediate_size=44)
    done("upcycle", tmp_path / "dense", "--experts", 3, *flags, "-o", tmp_path / "moe", "-q")
    model = load(tmp_path / "moe")
    assert (logits(model) - logits(load(tmp_path / "dense"))).abs().max() < CLOSE
    trainer = trained(model, tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "out")
    done("verify", tmp_path / "out", "-q")
    for group in manifest(tmp_path / "out")["groups"]:
        assert len({member["restored_hash"] for member in group["members"]}) == len(group["members"])
    assert (logits(stock(restore(tmp_path / "out", tmp_path / "plain"))) - logits(model)).abs().max() < CLOSE
    done("verify", compress(tmp_path / "out", "int4", tmp_path / "int4"), "--against", tmp_path / "plain", "-q")


def test_frozen_base(tmp_path: Path) -> None:
    source = tmp_path / "source"
    toy.make("qwen3_moe", source)
    model = load(compress(source, "rank4", tmp_path / "packed"))
    hf.freeze_base(model)
    model(TOKENS, labels=TOKENS).loss.backward()
    graded = {
        name.split("_proj.")[1] for name, p in model.named_parameters() if "experts." in name and p.grad is not None
    }
    assert graded == FACTORS


# --- saving


def test_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    """As accelerate hands it over: gathered elsewhere, the model's own tensors may be empty."""
    source = tmp_path / "source"
    toy.make("mixtral", source)
    model = load(compress(source, "rank4", tmp_path / "packed"))
    given = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=given)
    found = load(tmp_path / "given").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    del given["model.layers.1.mlp.experts.up_proj.delta.left"]
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.experts\.up_proj\.delta\.left is missing"):
        model.save_pretrained(tmp_path / "short", state_dict=given)
    assert not (tmp_path / "short" / "ders.json").exists()


def test_sharded_model_is_saved_whole(tmp_path: Path) -> None:
    """FSDP2 on one process: the state dict is DTensors, the class has another name; the folder is that of the model alone."""
    toy.make("mixtral", tmp_path / "source")
    packed = compress(tmp_path / "source", "rank4", tmp_path / "packed")
    model, want = load(packed), logits(load(packed))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for layer in (*model.model.layers, model):
            torch.distributed.fsdp.fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        model(TOKENS, labels=TOKENS).loss.backward()
        model.save_pretrained(tmp_path / "out")
    finally:
        torch.distributed.destroy_process_group()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert weights(tmp_path / "out") == weights(packed)
    assert torch.equal(logits(load(tmp_path / "out")), want)


def test_a_changed_group_is_its_own_source(tmp_path: Path) -> None:
    """Errors and source hashes of the conversion hold for the groups that are as they were loaded, and for no other."""
    source = tmp_path / "source"
    toy.make("mixtral", source)
    packed = compress(source, "int4", tmp_path / "packed")
    model = load(packed)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "norm")
    assert manifest(tmp_path / "norm")["groups"] == manifest(packed)["groups"]
    assert "another expert" not in ders("verify", tmp_path / "norm", "--against", source).err
    assert ders("compress", tmp_path / "norm", "--delta", "int4", "-o", tmp_path / "a", "-q").code == 2  # lossy already

    with torch.no_grad():
        model.model.layers[0].mlp.experts.up_proj.base.add_(0.01)
    model.save_pretrained(tmp_path / "changed")
    done("verify", tmp_path / "changed", "-q")
    groups = manifest(tmp_path / "changed")["groups"]
    own = [g["name"] for g in groups if all(m["source_hash"] == m["restored_hash"] for m in g["members"])]
    assert own == ["model.layers.0.mlp.experts.up_proj"]
    assert (logits(stock(restore(tmp_path / "changed", tmp_path / "plain"))) - logits(model)).abs().max() < CLOSE
    verified = ders("verify", tmp_path / "changed", "--against", source, "--max-error", 0.5, "--json").json
    assert not [f for f in verified["findings"] if "experts" in f["where"]]


def test_saved_over_an_older_save(tmp_path: Path) -> None:
    """Into the folder that it is mapped from, with fewer shards: nothing of the old is left, others' files stay."""
    source = tmp_path / "source"
    toy.make("mixtral", source)
    packed = compress(source, "int4", tmp_path / "packed", "--max-shard-size", "50KB")
    (packed / "notes.txt").write_text("mine")
    model, before = load(packed), manifest(packed)["source"]["files"]
    want = logits(model)
    model.save_pretrained(packed)
    assert sorted(weights(packed)) == ["model.safetensors"]
    assert (packed / "notes.txt").read_text() == "mine"
    assert manifest(packed)["source"]["files"] == before
    assert torch.equal(logits(load(packed)), want)
    assert torch.equal(logits(model), want)


def test_broken_off_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: the older save stays whole. A crash between the last renames: no folder that looks complete."""
    source = tmp_path / "source"
    toy.make("mixtral", source)
    packed = compress(source, "int4", tmp_path / "packed", "--max-shard-size", "50KB")
    model, before = load(packed), contents(packed)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", full)
        with pytest.raises(OSError, match="No space"):
            model.save_pretrained(packed)
    assert contents(packed) == before

    rename, moved = os.replace, []

    def crash(here: Path, there: Path) -> None:
        if Path(there).parent == packed and len(moved) == 2:
            raise OSError("gone")
        moved.extend([there] if Path(there).parent == packed else [])
        rename(here, there)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="gone"):
            model.save_pretrained(packed)
    assert not (packed / "ders.json").exists()
    with pytest.raises((CheckpointError, OSError)):
        load(packed)


def test_diverged_model_is_not_saved(tmp_path: Path) -> None:
    source = tmp_path / "source"
    toy.make("mixtral", source)
    model = load(compress(source, "int4", tmp_path / "packed"))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.up_proj.base[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.up_proj, expert \d: .*\[3, 5\]"):
        model.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_changed_base_of_exact_deltas(tmp_path: Path) -> None:
    source = tmp_path / "source"
    toy.make("mixtral", source, dtype=torch.bfloat16)
    model = load(compress(source, "exact", tmp_path / "packed"), dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.up_proj.base[0, 0] += 1e-6
    with pytest.raises(CheckpointError, match=r"up_proj\.base: was changed"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("argument", [{"variant": "fp16"}, {"save_original_format": False}, {"push_to_hub": True}])
def test_arguments_that_are_refused(tmp_path: Path, argument: dict) -> None:
    source = tmp_path / "source"
    toy.make("mixtral", source)
    model = load(compress(source, "int4", tmp_path / "packed"))
    with pytest.raises(UsageError, match="packed model is saved"):
        model.save_pretrained(tmp_path / "out", **argument)


# --- what is refused


def test_incomplete_and_damaged_folders(tmp_path: Path) -> None:
    source = tmp_path / "source"
    toy.make("mixtral", source)
    whole = compress(source, "int4", tmp_path / "whole", "--max-shard-size", "50KB")

    def broken(name: str) -> Path:
        return shutil.copytree(whole, tmp_path / name)

    (broken("missing") / "ders.json").unlink()
    with pytest.raises(CheckpointError, match=r"ders\.json: missing.*complete"):
        load(tmp_path / "missing")
    text = (whole / "ders.json").read_text()
    (broken("changed") / "ders.json").write_text(text.replace('"up"', '"down"', 1))
    with pytest.raises(CheckpointError, match="checksum"):
        load(tmp_path / "changed")
    (broken("newer") / "ders.json").write_text(text.replace('"format": 1', '"format": 99', 1))
    with pytest.raises(CheckpointError, match="format 99; this ders reads format 1"):
        load(tmp_path / "newer")
    config = json.loads((whole / "config.json").read_text()) | {"num_local_experts": 4}
    (broken("experts") / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected 4 experts.*has 3"):
        load(tmp_path / "experts")
    last = sorted(broken("shard").glob("model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises((CheckpointError, OSError), match=re.escape(last.name)):
        load(tmp_path / "shard")
    with pytest.raises(UsageError, match="state_dict"):
        transformers.MixtralForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(whole), state_dict={})


def test_plain_model_is_not_made_packed(tmp_path: Path) -> None:
    toy.make("mixtral", tmp_path / "source")
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=hf.DersConfig())


@pytest.mark.parametrize("version", ["4.57.1", "5.20.0", "6.0.0"])
def test_versions(version: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"transformers {re.escape(version)} is installed; expected >=5.21,<6"):
        hf.check_transformers(version)
    hf.check_transformers("5.21.0")
    hf.check_transformers(transformers.__version__)


@pytest.mark.parametrize("delta", ["int4", "rank4"])
def test_fp16_keeps_small_deltas(tmp_path: Path, delta: str) -> None:
    """A scale of 1e-9 has no room in fp16: the parts stay as they are stored, and so does D."""
    toy.make("mixtral", tmp_path / "source", dtype=torch.bfloat16)
    model = load(compress(tmp_path / "source", delta, tmp_path / "packed"), dtype=torch.float16)
    own = model.model.layers[0].mlp.experts.up_proj
    part = own.delta.get_parameter("scale" if delta == "int4" else "left")
    x = torch.eye(own.group.shape[1])
    before = own.delta_product(x, 1)
    with torch.no_grad():
        part.mul_(2.0**-30)
    assert own.base.dtype == torch.float16
    assert torch.equal(own.delta_product(x, 1) * 2.0**30, before)


EVEN = {
    "mixtral": dict(hidden_size=32, intermediate_size=48),
    "gpt_oss": dict(hidden_size=32, intermediate_size=48),
    "granitemoe": dict(hidden_size=32, intermediate_size=48),
    "qwen2_moe": dict(hidden_size=32, moe_intermediate_size=48),
    "nemotron_h": dict(hidden_size=32, moe_intermediate_size=48),
}


@pytest.mark.parametrize("delta", ["int4", "rank4"])
@pytest.mark.parametrize("name", EVEN)
def test_kept_weights_run_as_the_stock_module(tmp_path: Path, monkeypatch, name: str, delta: str) -> None:
    """Small experts with room to be kept go through the stock code; the same logits as by way of base and deltas, changes
    are seen, nothing is left in the stock module, and what is kept goes with train() and with the limit."""
    toy.make(name, tmp_path / "source", **EVEN[name])
    model = load(compress(tmp_path / "source", delta, tmp_path / "packed")).eval()
    own = [m for m in model.modules() if isinstance(m, hf.load.HfExperts)]
    calls = []
    for module in own:
        run = module._stacked.run
        monkeypatch.setattr(module._stacked, "run", lambda *a, run=run: calls.append(1) or run(*a))

    def by(way: str) -> torch.Tensor:
        for module in own:
            module.way = way
        with torch.inference_mode():  # without eval(), which frees what is kept
            return model(TOKENS).logits

    want = by("apart")
    assert not calls
    assert (by("auto") - want).abs().max() < CLOSE
    assert len(calls) == len(own)
    held = WEIGHTS.held
    assert held >= sum(p.numel() * 4 for m in own for p in m._stacked._stock.parameters() if p.is_meta)
    assert all(p.is_meta for m in own for n, p in m._stacked._stock.named_parameters() if n in STACKED)
    with torch.no_grad():
        own[0].up_proj.base.add_(0.01)
    moved = by("auto")
    assert (moved - want).abs().max() > 100 * CLOSE
    assert (moved - by("apart")).abs().max() < CLOSE
    model.train()
    assert WEIGHTS.held < held
    model.eval()
    monkeypatch.setattr(WEIGHTS, "_limit", 0)
    calls.clear()
    assert (by("auto") - moved).abs().max() < CLOSE
    assert not calls
