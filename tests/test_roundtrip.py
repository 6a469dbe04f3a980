"""There and back: every storage family, exact to the bit; restored folders load in stock transformers."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import toy
from command import contents, ders, done
from transformers import AutoModelForCausalLM

from ders_cli import plain
from ders_cli.checkpoint.reader import CheckpointReader
from ders_cli.checkpoint.writer import ShardWriter
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.report import Progress

FUSED = ["mixtral", "qwen3_moe", "lfm2_moe", "jamba"]  # stored per expert as a rule, and fused on request


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.arange(1, 9)[None]).logits


@pytest.mark.parametrize(("name", "fused"), [(n, False) for n in toy.MODELS] + [(n, True) for n in FUSED])
def test_exact_returns_every_file(tmp_path: Path, name: str, fused: bool) -> None:
    """fp32, exact: all files byte for byte; the restored folder has the original's logits in stock transformers."""
    source, packed, plain = tmp_path / "source", tmp_path / "packed", tmp_path / "plain"
    toy.make(name, source, fused=fused)
    done("compress", source, "--delta", "exact", "-o", packed, "-q")
    done("verify", packed, "--against", source, "-q")
    done("restore", packed, "-o", plain, "-q")
    assert contents(plain) == contents(source)
    assert torch.equal(_logits(plain), _logits(source))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_exact_in_16_bits(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source, packed, plain = tmp_path / "source", tmp_path / "packed", tmp_path / "plain"
    toy.make(name, source, dtype=dtype)
    toy.reshard(source, 3)
    done("decompose", source, "--base", "expert:1", "-o", packed, "-q")
    done("restore", packed, "-o", plain, "-q", "-j", 2)
    assert contents(plain) == contents(source)


@pytest.mark.parametrize("style", ["stablelm", "phi", "meta", "xft", "mixed"])
def test_layouts_outside_transformers(tmp_path: Path, style: str) -> None:
    """MoE-LLaVA, Med-MoE, XFT, and 2-D beside 3-D layers: exact, with and without the shared expert."""
    source = tmp_path / "source"
    if style == "xft":
        toy.xft(source)
    elif style == "mixed":
        toy.mixed(source)
    else:
        toy.moe_llava(source, "phi" if style == "phi" else "stablelm", meta=style == "meta")
    for flags in ([], ["--shared"]) if style in ("meta", "xft") else ([],):
        packed, plain = tmp_path / f"packed{len(flags)}", tmp_path / f"plain{len(flags)}"
        done("compress", source, "--delta", "exact", "-o", packed, "-q", *flags)
        done("verify", packed, "--against", source, "-q")
        done("restore", packed, "-o", plain, "-q")
        assert contents(plain) == contents(source)


@pytest.mark.parametrize(
    "delta", ["int4", "int1", "drop0.9", "ternary0.1", "top0.1", "2:4", "rank4", "drop0.5+int4", "int1+rank2"]
)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "nemotron_h"])
def test_lossy_restores_what_it_noted(tmp_path: Path, name: str, delta: str) -> None:
    """A lossy conversion verifies against its original, restores, and the restored folder is what verify measured."""
    source, packed, plain = tmp_path / "source", tmp_path / "packed", tmp_path / "plain"
    toy.make(name, source, dtype=torch.bfloat16)
    done("compress", source, "--delta", delta, "--group-size", 32, "-o", packed, "-q")
    measured = done("verify", packed, "--against", source, "--json").json
    done("restore", packed, "-o", plain, "-q")
    assert contents(plain).keys() == contents(source).keys()
    again = done("verify", plain, source, "--max-error", 1, "--json").json
    for here, there in zip(measured["experts"], again["experts"], strict=True):
        assert here["weight"] == pytest.approx(there["weight"], rel=1e-5)
        assert here["max_abs"] == there["max_abs"]
    assert _logits(plain).isfinite().all()


def test_source_is_never_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    toy.make("mixtral", source)
    before = {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in source.iterdir()
    }
    done("compress", source, "--delta", "int2", "-o", tmp_path / "packed", "-q")
    done("restore", tmp_path / "packed", "-o", tmp_path / "plain", "-q")
    assert before == {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in source.iterdir()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_exact_keeps_any_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """-0, infinities, NaN payloads, subnormals and experts without any likeness come back as they were."""
    source = tmp_path / "source"
    toy.make("mixtral", source, dtype=dtype)
    file = source / "model.safetensors"
    tensors = toy.load_file(file)
    names = [name for name in tensors if ".experts." in name]
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    random = torch.Generator().manual_seed(1)
    for name in names[::2]:
        low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
        tensors[name] = torch.randint(low, high, tensors[name].shape, generator=random, dtype=bits).view(dtype)
    tensors[names[1]].view(bits).fill_(torch.iinfo(bits).min)  # -0
    toy.save_file(tensors, file, metadata={"format": "pt"})
    for base in ("mean", "expert:2"):
        packed, plain = tmp_path / f"packed-{base[-1]}", tmp_path / f"plain-{base[-1]}"
        done("compress", source, "--delta", "exact", "--base", base, "-o", packed, "-q")
        done("verify", packed, "-q")
        done("restore", packed, "-o", plain, "-q")
        assert contents(plain) == contents(source)


def test_dense_base(tmp_path: Path) -> None:
    """--base DIR: stored in the output, named in ders.json, and zero deltas where an expert is the dense FFN."""
    dense, source, packed = tmp_path / "dense", tmp_path / "source", tmp_path / "packed"
    toy.dense(dense, dtype=torch.bfloat16)
    toy.make("mixtral", source, dtype=torch.bfloat16)
    tensors, weights = toy.load_file(source / "model.safetensors"), toy.load_file(dense / "model.safetensors")
    short = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name in tensors:
        if ".experts.0." in name:
            layer, projection = name.split(".")[2], short[name.split(".")[-2]]
            tensors[name] = weights[f"model.layers.{layer}.mlp.{projection}.weight"].clone()
    toy.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    done("compress", source, "--delta", "int1", "--base", dense, "-o", packed, "-q")
    report = done("verify", packed, "--against", source, "--json").json
    assert all(expert["max_abs"] == 0 for expert in report["experts"] if expert["expert"] == "0")
    assert any(expert["max_abs"] > 0 for expert in report["experts"] if expert["expert"] == "1")


def test_decomposed_converts_like_the_original(tmp_path: Path) -> None:
    """sparsify and quantize take a decomposed checkpoint, and make of it what they make of the plain one."""
    source, exact = tmp_path / "source", tmp_path / "exact"
    toy.make("qwen3_moe", source, dtype=torch.bfloat16)
    done("decompose", source, "-o", exact, "-q")
    for number, command in enumerate(
        (["quantize", "--bits", 4], ["sparsify", "--drop", 0.9], ["sparsify", "--method", "2:4"])
    ):
        first, second = tmp_path / f"a{number}", tmp_path / f"b{number}"
        done(command[0], source, *command[1:], "-o", first, "-q")
        done(command[0], exact, *command[1:], "-o", second, "-q")
        assert contents(first) == contents(second)


class Killed(BaseException):
    """What a SIGKILL does to the code behind it, in a test."""


def test_a_resumed_restore_lets_go_of_what_the_last_run_finished(tmp_path: Path, monkeypatch) -> None:
    """Or the pieces of a remote checkpoint that hold it stay in scratch to the end. It counts as progress, too."""

    def killed(writer: ShardWriter) -> None:
        raise Killed

    packed, out, moved, let_go = tmp_path / "packed", tmp_path / "out", Counter(), set()
    monkeypatch.setattr(Progress, "advance", lambda self, count: moved.update({"bytes": count}))
    toy.make("gpt_oss", tmp_path / "model", dtype=torch.bfloat16)
    done("compress", tmp_path / "model", "--delta", "exact", "-o", packed, "-q")
    moved.clear()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ShardWriter, "close", killed)  # every part of the shard is in its journal
        ders("restore", packed, "-o", out, "-q", "-j", 1)
    whole = Counter(moved)
    moved.clear()
    monkeypatch.setattr(CheckpointReader, "done", lambda self, name: let_go.add(name))
    done("restore", packed, "-o", out, "-q", "-j", 1, "--resume")
    manifest = json.loads((packed / "ders.json").read_text())
    assert let_go == set(manifest["tensors"]) - set(manifest["guards"]) and moved == whole
    assert contents(out) == contents(tmp_path / "model")


def test_progress_of_groups_that_share_a_tensor() -> None:
    """A finished expert counts with its own size, wherever it stands in the tensor."""
    groups = [
        ExpertGroup(name, 0, "up", "BF16", (("0", MatrixView("t", shape, 0, 1, 1)),))
        for name, shape in (("small", (2, 2)), ("large", (4, 4)))
    ]
    held, moved, freed = {"t": [(group, 0) for group in groups]}, [], []
    writer = SimpleNamespace(tensors={"t": None}, finished={"expert 0 of small": []})
    source = SimpleNamespace(done=lambda group, members: freed.append((group.name, members)))
    left = plain._left(source, writer, held, SimpleNamespace(advance=moved.append))
    assert left == {"t": [(groups[1], 0)]} and moved == [2 * 2 * 2] and freed == [("small", [0])]
