"""ders upcycle: its settings, what is refused, and that a run can be interrupted, resumed and repeated."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from command import contents, ders, done, whole
from safetensors.torch import load_file, save_file

from ders_cli.checkpoint.writer import ShardWriter

INNER = 48
FORMS = {
    "rank": ("--rank", 4),
    "sparse": ("--sparse", 0.9),
    "full": ("--full",),
    "noise": ("--full", "--noise", 0.1),
    "split": ("--full", "--split", 3),
}


def expert(layer: int, number: int, name: str = "w1") -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{name}.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    toy.dense(folder, dtype=torch.bfloat16, intermediate_size=INNER, num_hidden_layers=3)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def upcycle(dense: Path, out: Path, *options: object) -> dict:
    return done("upcycle", dense, "-o", out, "--json", *options).json


# --- bytes ---


@pytest.mark.parametrize("form", FORMS)
def test_planned_bytes_and_threads(dense, tmp_path, form) -> None:
    """A dry run names the bytes that are written, writes none, and any number of threads writes the same."""
    planned = upcycle(dense, tmp_path / "a", *FORMS[form], "--dry-run")
    assert planned["dry_run"] and not list(tmp_path.iterdir())
    one = upcycle(dense, tmp_path / "a", *FORMS[form], "--jobs", 1)
    upcycle(dense, tmp_path / "b", *FORMS[form], "--jobs", 3)
    assert one["plan"] == planned["plan"] | {k: one["plan"][k] for k in ("peak_memory_bytes",) if k in one["plan"]}
    assert planned["plan"]["exact"] and planned["plan"]["output_bytes"] == one["output_bytes"]
    assert one["output_bytes"] == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("form", ["rank", "full"])
def test_shards(dense, tmp_path, form) -> None:
    """Small shards, and a dense model in shards: the same tensors; restore gives the sharded full form, byte for byte."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    small = ("--max-shard-size", "20KB")
    upcycle(dense, tmp_path / "one", *FORMS[form])
    document = upcycle(tmp_path / "sharded", tmp_path / "many", *FORMS[form], *small)
    files = list((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == document["plan"]["shards"] > 3
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    if form == "rank":
        done("restore", tmp_path / "many", "-o", tmp_path / "plain", "-q")
        upcycle(tmp_path / "sharded", tmp_path / "full", "--full", *small)
        assert contents(tmp_path / "plain") == contents(tmp_path / "full")


@pytest.mark.parametrize("form", ["rank", "full", "noise"])
def test_interrupted_and_resumed(dense, tmp_path, monkeypatch, form) -> None:
    options = ("upcycle", dense, *FORMS[form], "--max-shard-size", "30KB", "-q", "-o")
    done(*options, tmp_path / "whole")
    writes, write = [0], ShardWriter.close

    def dying(self, *arguments):
        writes[0] += 1
        if writes[0] == 4:
            raise OSError(28, "No space left on device", "out")
        return write(self, *arguments)

    monkeypatch.setattr(ShardWriter, "close", dying)
    ran = ders(*options, tmp_path / "moe")
    assert ran.code == 1 and "No space left" in ran.err and not (tmp_path / "moe").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "moe.partial").glob("*.safetensors")}
    assert len(kept) == 3
    monkeypatch.undo()
    assert ders(*options, tmp_path / "moe").code == 2  # an unfinished run stands here
    for other in (("--seed", 1), ("--top-k", 1), ("--layers", "0"), ("--experts", 3)):
        ran = ders(*options, tmp_path / "moe", "--resume", *other)
        assert ran.code == 2 and "was begun with another" in ran.err, other
    ran = ders("upcycle", dense, "--sparse", 0.5, "--max-shard-size", "30KB", "-o", tmp_path / "moe", "--resume")
    assert ran.code == 2 and "was begun with another recipe" in ran.err
    done(*options, tmp_path / "moe", "--resume")
    assert contents(tmp_path / "moe") == contents(tmp_path / "whole")
    assert all((tmp_path / "moe" / path.name).stat().st_mtime_ns == when for path, when in kept.items())


def test_resume_with_another_config(dense, tmp_path, monkeypatch) -> None:
    """initializer_range is in config.json, and the routers are made of it."""
    shutil.copytree(dense, tmp_path / "dense")
    options = ("upcycle", tmp_path / "dense", "--full", "-o", tmp_path / "moe", "-q")
    monkeypatch.setattr(ShardWriter, "close", lambda self: (_ for _ in ()).throw(OSError(28, "full", "out")))
    assert ders(*options).code == 1
    monkeypatch.undo()
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {"initializer_range": 1.0}))
    ran = ders(*options, "--resume")
    assert ran.code == 2 and "another source" in ran.err


def test_overwrite_and_places(dense, tmp_path) -> None:
    upcycle(dense, tmp_path / "moe", "--full")
    for extra in ((), ("--dry-run",)):
        assert ders("upcycle", dense, "--full", "-o", tmp_path / "moe", *extra).code == 2
    upcycle(dense, tmp_path / "moe", "--full", "--overwrite", "--experts", 2)
    assert expert(0, 2) not in tensors_of(tmp_path / "moe")
    tune = shutil.copytree(dense, tmp_path / "tune")
    before = contents(tune)
    for form in ((), ("--full",)):
        for place in (tune, dense):
            ran = ders("upcycle", dense, "--expert-from", tune, *form, "-o", place, "--overwrite")
            assert ran.code == 2 and "the input" in ran.err
    assert contents(tune) == before
    default = done("upcycle", dense, "--rank", 1, "--dry-run", "--json").json["output"]
    assert default == str(dense.with_name("dense-moe4-rank1").resolve())


# --- settings ---


@pytest.mark.parametrize("router", ["normal", "zero"])
def test_router(dense, tmp_path, router) -> None:
    upcycle(dense, tmp_path / "a", "--rank", 2, "--router", router)
    upcycle(dense, tmp_path / "b", "--rank", 2, "--router", router, "--seed", 1)
    name = "model.layers.1.block_sparse_moe.gate.weight"
    a, b = (tensors_of(tmp_path / x)[name] for x in "ab")
    assert a.shape == (4, 40) and a.dtype == torch.bfloat16
    assert torch.equal(a, b) == (router == "zero") == (not a.any())


def test_upcycling_is_kept(dense, tmp_path) -> None:
    upcycle(dense, tmp_path / "moe", "--sparse", 0.5, "--experts", 3, "--layers", "0,2", "--split", 2, "--top-k", 1)
    kept = json.loads((tmp_path / "moe" / "ders.json").read_text())
    assert kept["upcycling"] == {
        "experts": 3,
        "top_k": 1,
        "layers": "0,2",
        "split": 2,
        "router": "normal",
        "prompts": None,
        "noise": 0.0,
        "average": False,
        "donors": [],
        "per_layer": [],
        "dense": "dense",
    }
    assert kept["recipe"]["delta"] == "sparse0.5" and kept["recipe"]["base"] == "dense:dense"
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]) == (6, 2, 24)


@pytest.mark.parametrize(("layers", "chosen"), [("even", {0, 2}), ("1", {1}), ("0-1", {0, 1}), ("odd", {1})])
def test_layers_of_a_mixtral(dense, tmp_path, layers, chosen) -> None:
    """Its class has experts in all layers: the others' are copies of the dense FFN, and have no delta."""
    upcycle(dense, tmp_path / "moe", "--rank", 4, "--layers", layers)
    groups = json.loads((tmp_path / "moe" / "ders.json").read_text())["groups"]
    assert {g["layer"] for g in groups if g["codec"]["codec"] == "rank"} == chosen
    assert {g["layer"] for g in groups if g["codec"]["codec"] == "none"} == {0, 1, 2} - chosen
    upcycle(dense, tmp_path / "noisy", "--full", "--noise", 0.5, "--layers", layers)
    found, source = tensors_of(tmp_path / "noisy"), tensors_of(dense)
    for layer in range(3):
        same = torch.equal(found[expert(layer, 1)], source[f"model.layers.{layer}.mlp.gate_proj.weight"])
        assert same == (layer not in chosen)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_layers_of_a_qwen(tmp_path, model_type) -> None:
    """Its class can leave layers dense: there are no experts and no router there, and the logits are the dense model's."""
    from test_upcycle import load_quietly

    settings = dict(intermediate_size=INNER, num_hidden_layers=3, head_dim=10)
    dense = toy.dense(tmp_path / "dense", model_type, **settings)
    done("upcycle", tmp_path / "dense", "--rank", 4, "--layers", "odd", "-o", tmp_path / "moe", "-q")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["mlp_only_layers"] == [0, 2]
    done("restore", tmp_path / "moe", "-o", tmp_path / "plain", "-q")
    found = tensors_of(tmp_path / "plain")
    assert {name.split(".")[2] for name in found if ".experts." in name or ".mlp.gate.weight" in name} == {"1"}
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], dense.model.layers[2].mlp.up_proj.weight)
    tokens = torch.arange(1, 25).reshape(2, 12)
    with torch.no_grad():
        difference = load_quietly(tmp_path / "plain")(tokens).logits - dense(tokens).logits
    assert difference.abs().max() < 1e-5  # fp32 sums in another order


def test_noise(dense, tmp_path) -> None:
    """Its size, row by row; different in every copy and matrix; of the seed; none at 0."""
    shutil.copytree(dense, tmp_path / "dense")
    source = {name: tensor.float() for name, tensor in tensors_of(dense).items()}
    source["model.layers.0.mlp.gate_proj.weight"][3] *= 100  # noise goes by a row's own size
    save_file(source, tmp_path / "dense" / "model.safetensors")
    for out, *options in (("a", 0.1), ("again", 0.1), ("seed", 0.1, "--seed", 1), ("none", 0)):
        upcycle(tmp_path / "dense", tmp_path / out, "--full", "--noise", *options)
    upcycle(tmp_path / "dense", tmp_path / "plain", "--full")
    assert contents(tmp_path / "a") == contents(tmp_path / "again")
    assert contents(tmp_path / "none") == contents(tmp_path / "plain")
    a, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "seed")
    drawn = {}
    for layer in range(3):
        for p, w in (("gate", "w1"), ("down", "w2")):
            base = source[f"model.layers.{layer}.mlp.{p}_proj.weight"]
            scale = 0.1 * base.square().mean(dim=1, keepdim=True).sqrt()
            for number in range(4):
                drawn[layer, p, number] = ((a[expert(layer, number, w)] - base) / scale).flatten()
            drawn[layer, p, "seed"] = ((other[expert(layer, 0, w)] - base) / scale).flatten()
    for where, noise in drawn.items():
        assert (
            abs(noise.mean()) < 4.5 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 4.5 / (2 * noise.numel()) ** 0.5
        ), where
    correlations = np.corrcoef(torch.stack(list(drawn.values())).numpy()) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 5 / INNER**0.5 / 40**0.5


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "expected --rank R, --sparse P or --full"),
        (("--rank", 2, "--full"), "--rank and --full: expected one of them"),
        (("--rank", 0), ""),
        (("--experts", 0, "--full"), ""),
        (("--experts", 4097, "--full"), ""),
        (("--sparse", 1), "expected a share of 0 ... below 1"),
        (("--sparse", -0.1), "expected a share of 0 ... below 1"),
        (("--sparse", "nan"), "expected a share of 0 ... below 1"),
        (("--full", "--top-k", 5), "--top-k 5: expected 1 ... 4"),
        (("--full", "--noise", "nan"), ""),
        (("--full", "--noise", "inf"), "--noise inf"),
        (("--rank", 2, "--noise", 0.1), "--noise goes with --full"),
        (("--full", "--split", 5), "48 neurons cannot be cut into 5"),
        (("--full", "--split", 2, "--router", "zero"), "all slices would tie"),
        (("--full", "--experts", 4096, "--split", 2), "8192 experts; expected at most 4096"),
        (("--full", "--layers", "3"), "names none of the layers 0 ... 2"),
        (("--full", "--layers", "x"), "expected all, even, odd or numbers"),
        (("--full", "--average-others"), "--average-others goes with fine-tunes"),
        (("--delta", "int4"), "--delta says how the deltas of --expert-from"),
        (("--full", "--seed", -1), "seed"),
        (("--rank", 2, "--seed", -1), "seed"),
        (("--rank", 2, "--max-shard-size", "x"), "--max-shard-size"),
        (("--rank", 2, "--expert-from", "."), "--expert-from brings its own deltas"),
        (("--delta", "", "--expert-from", "."), "--delta: expected a codec"),
        (("--experts", 3, "--expert-from", "."), "each is one expert"),
    ],
)
def test_usage(dense, tmp_path, options, said) -> None:
    ran = ders("upcycle", dense, *options, "-o", tmp_path / "moe", "--json")
    assert ran.code == 2 and said in ran.err and not list(tmp_path.iterdir())
    assert ran.json["error"]["exit_code"] == 2


def test_smallest_and_largest_shares(dense, tmp_path) -> None:
    """--sparse 0 keeps everything; of --sparse 1e-9 from 1 hardly an entry is left."""
    assert (
        upcycle(dense, tmp_path / "a", "--sparse", 0, "--dry-run")["parameters"]["added"] == 4 * 9 * 40 * 48 + 3 * 160
    )
    assert (
        upcycle(dense, tmp_path / "a", "--sparse", 0.999999999, "--dry-run")["parameters"]["added"] == 4 * 9 + 3 * 160
    )


def change(folder: Path, **config: object) -> None:
    found = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value != "absent"}))


def _nan(folder: Path) -> None:
    _tensor(folder, "model.layers.1.mlp.down_proj.weight", lambda t: t.index_fill(0, torch.tensor([7]), float("nan")))


def _tensor(folder: Path, name: str, harm) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensor = harm(tensors.pop(name))
    if tensor is not None:
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN = {
    "nan": (_nan, f"{DOWN}: expected finite BF16, found nan at [7, 0]"),
    "no model_type": (lambda f: change(f, model_type="absent"), "model_type: expected the name"),
    "model_type a list": (lambda f: change(f, model_type=["llama"]), "model_type: expected the name"),
    "a moe": (lambda f: change(f, model_type="mixtral"), "'mixtral' has experts already"),
    "unknown": (lambda f: change(f, model_type="mamba"), "no row of ders_cli/pairs.py"),
    "another head": (lambda f: change(f, architectures=["LlamaForSequenceClassification"]), "is no language model"),
    "quantised": (lambda f: change(f, quantization_config={"quant_method": "gptq"}), "is quantised"),
    "initializer": (lambda f: change(f, initializer_range="x"), "initializer_range: expected a number"),
    "no up": (lambda f: _tensor(f, UP, lambda t: None), f"{UP}: missing"),
    "short up": (lambda f: _tensor(f, UP, lambda t: t[:-1]), "expected BF16 [47, 40] beside"),
    "short down": (lambda f: _tensor(f, DOWN, lambda t: t[:, :-1]), f"{DOWN}: expected BF16 [40, 48] beside {UP}"),
    "another dtype": (lambda f: _tensor(f, DOWN, lambda t: t.float()), f"{DOWN}: expected BF16 [40, 48]"),
    "int8": (lambda f: _tensor(f, UP, lambda t: t.to(torch.int8)), f"{UP}: expected expert weights in BF16"),
    "one axis": (lambda f: _tensor(f, UP, lambda t: t.flatten()), f"{UP}: expected 2 axes"),
    "another hidden": (lambda f: _tensor(f, DOWN, lambda t: t[:-1]), f"{DOWN}: expected BF16 [40, 48]"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "no config": (lambda f: (f / "config.json").unlink(), "missing; expected the model's configuration"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors"),
    "cut off": (lambda f: os.truncate(f / "model.safetensors", 5000), "Is the file complete?"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("form", ["rank", "full"])
def test_broken_models(dense, tmp_path, kind, form) -> None:
    harm, said = BROKEN[kind]
    harm(Path(shutil.copytree(dense, tmp_path / "dense")))
    ran = ders("upcycle", tmp_path / "dense", *FORMS[form], "-o", tmp_path / "moe", "--json")
    assert ran.code == 4 and said in ran.err and ran.err.count("\n") == 1
    assert ran.json["error"] == {"message": ran.err.removeprefix("ders: ").rstrip("\n"), "exit_code": 4}
    assert not (tmp_path / "moe").exists()


def test_ffns_of_several_sizes(dense, tmp_path) -> None:
    folder = Path(shutil.copytree(dense, tmp_path / "dense"))
    for p in ("gate", "up"):
        _tensor(folder, f"model.layers.1.mlp.{p}_proj.weight", lambda t: t[:-8])
    _tensor(folder, DOWN, lambda t: t[:, :-8])
    ran = ders("upcycle", folder, "--full", "-o", tmp_path / "moe")
    assert ran.code == 4 and "FFNs of [40, 48] neurons" in ran.err


def test_an_upcycled_model_is_not_upcycled(dense, tmp_path) -> None:
    upcycle(dense, tmp_path / "moe", "--rank", 2)
    ran = ders("upcycle", tmp_path / "moe", "--rank", 2)
    assert ran.code == 4 and "is a DeRS checkpoint" in ran.err
    assert ders("upcycle", tmp_path / "none", "--rank", 2).code == 2
    (tmp_path / "empty").mkdir()
    assert ders("upcycle", tmp_path / "empty", "--rank", 2).code == 4


def test_as_a_user_runs_it(dense, tmp_path) -> None:
    """One process, one document, no torch."""
    ran = whole("upcycle", dense, "--rank", 2, "-o", tmp_path / "moe", "--json", PYTHONVERBOSE="")
    assert ran.returncode == 0 and ran.stderr == ""
    document = json.loads(ran.stdout)
    assert document["parameters"]["added"] == 4 * 2 * 9 * (40 + 48) + 3 * 160
    ran = whole("upcycle", dense, "--rank", 2, "-o", tmp_path / "moe" / "config.json")
    assert ran.returncode == 2 and "Traceback" not in ran.stderr and "a file stands here" in ran.stderr
    text = done("upcycle", dense, "--sparse", 0.9, "-o", tmp_path / "text").out
    assert text.startswith(f"{tmp_path / 'text'}\n") and "parameters" in text
    assert done("upcycle", dense, "--full", "-o", tmp_path / "quiet", "-q").out == f"{tmp_path / 'quiet'}\n"


@pytest.mark.parametrize("layers", ["²", "1-²"])
def test_digits_that_are_no_numbers(tmp_path, layers):
    toy.dense(tmp_path / "dense")
    assert ders("upcycle", tmp_path / "dense", "--full", "--layers", layers, "-o", tmp_path / "moe").code == 2


def test_verify_names_experts_that_no_slice_holds(tmp_path):
    """2 experts in 2 slices against 4 in 2: the missing ones are named, whichever is tested."""
    toy.dense(tmp_path / "dense", intermediate_size=48)
    done("upcycle", tmp_path / "dense", "--rank", 2, "--experts", 2, "--split", 2, "-o", tmp_path / "two", "-q")
    done("upcycle", tmp_path / "dense", "--full", "--experts", 4, "--split", 2, "-o", tmp_path / "four", "-q")
    for tested, reference in (("two", "four"), ("four", "two")):
        ran = ders("verify", tmp_path / tested, "--against", tmp_path / reference, "--json", "--no-output")
        assert ran.code == 3
        problems = [f for f in ran.json["findings"] if "mlp.experts" in f["where"]]
        assert len(problems) == 2 * 3, problems


def test_a_fitted_router_that_is_not_finite(tmp_path, monkeypatch):
    toy.dense(tmp_path / "dense")
    (tmp_path / "prompts.yaml").write_text("- [a]\n- [b]\n")
    rows = {f"model.layers.{layer}": np.full((2, toy.HIDDEN), np.nan, np.float32) for layer in range(2)}
    monkeypatch.setattr("ders_cli.router_fit.fit_routers", lambda *_: (rows, 0.0))
    options = ("--rank", 2, "--experts", 2, "--router", tmp_path / "prompts.yaml", "-o", tmp_path / "moe")
    ran = ders("upcycle", tmp_path / "dense", *options)
    assert (ran.code, "gate.weight" in ran.err) == (4, True)
