"""Experts from fine-tunes and from LoRA adapters of a dense model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from command import contents, ders, done
from safetensors.torch import load_file, save_file

from ders_cli import convert
from ders_cli.base import mean
from ders_cli.errors import DersError

HIDDEN, INNER = 40, 48
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
GATE = "model.layers.0.mlp.gate_proj.weight"
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def expert(tensors: dict, layer: int, number: int, projection: str) -> torch.Tensor:
    return tensors[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{EXPERT[projection]}.weight"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def perturbed(dense: Path, folder: Path, seed: int, ffn_only: bool = False) -> Path:
    """A fine-tune: the dense model with a little of its own in every weight, or in its FFN alone."""
    shutil.copytree(dense, folder)
    random, tensors = torch.Generator().manual_seed(seed), weights(folder)
    for name, tensor in tensors.items():
        if not ffn_only or ".mlp." in name:
            own = 0.1 * tensor.float().std() * torch.randn(tensor.shape, generator=random)
            tensors[name] = (tensor.float() + own).to(tensor.dtype)
    write(folder, tensors)
    return folder


def bits(tensor: torch.Tensor) -> np.ndarray:
    width = torch.int32 if tensor.dtype == torch.float32 else torch.int16
    return tensor.contiguous().view(width).numpy().view(np.uint32 if width == torch.int32 else np.uint16)


def made(out: Path, dense: Path, donors: list[Path], *more: object) -> dict:
    """`ders upcycle` of the donors; its JSON."""
    flags = [flag for donor in donors for flag in ("--expert-from", donor)]
    return done("upcycle", dense, *flags, "-o", out, "--json", *more).json


def restored(out: Path) -> dict[str, torch.Tensor]:
    done("verify", out, "-q")
    plain = out.with_name(f"{out.name}-plain")
    done("restore", out, "-o", plain, "-q")
    return weights(plain)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def family(request, tmp_path_factory):
    """A dense model and three fine-tunes."""
    folder = tmp_path_factory.mktemp("family")
    toy.dense(folder / "dense", dtype=request.param, intermediate_size=INNER)
    return folder / "dense", [perturbed(folder / "dense", folder / f"tune{i}", i + 1) for i in range(3)]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    toy.dense(folder, dtype=torch.bfloat16, intermediate_size=INNER)
    return folder


# --- fine-tunes ---


def test_exact_experts_are_the_fine_tunes_own(family, tmp_path) -> None:
    dense, tunes = family
    document = made(tmp_path / "moe", dense, tunes)
    tensors, of_dense = restored(tmp_path / "moe"), weights(dense)
    for number, tune in enumerate(tunes):
        own = weights(tune)
        for layer in range(2):
            for p in EXPERT:
                matrix = own[f"model.layers.{layer}.mlp.{p}_proj.weight"]
                assert torch.equal(expert(tensors, layer, number, p), matrix)
                assert not torch.equal(matrix, of_dense[f"model.layers.{layer}.mlp.{p}_proj.weight"])
    others = [name for name in of_dense if ".mlp." not in name]
    assert all(torch.equal(tensors[name], of_dense[name]) for name in others)
    full = made(tmp_path / "full", dense, tunes, "--full")
    assert contents(tmp_path / "moe-plain") == contents(tmp_path / "full")
    assert document["fine_tunes"] == full["fine_tunes"]
    done("verify", tmp_path / "moe", tmp_path / "full", "-q")


def test_what_the_others_differ_in_is_said(family, tmp_path) -> None:
    dense, tunes = family
    of_dense = weights(dense)
    names = [name for name in of_dense if ".mlp." not in name]
    document = made(tmp_path / "moe", dense, tunes, "--dry-run")
    assert [entry["donor"] for entry in document["fine_tunes"]] == [str(tune) for tune in tunes]
    for entry, tune in zip(document["fine_tunes"], tunes, strict=True):
        own = weights(tune)
        error = sum((own[n].double() - of_dense[n].double()).square().sum() for n in names)
        size = sum(of_dense[n].double().square().sum() for n in names)
        changed = sum(not torch.equal(own[n], of_dense[n]) for n in names)
        assert (entry["tensors"], entry["of"]) == (changed, len(names))
        assert entry["relative"] == pytest.approx(float((error / size).sqrt()), rel=1e-3)  # printed to four digits
    text = done("upcycle", dense, "--expert-from", tunes[0], "-o", tmp_path / "one").out
    assert "an expert does not hold them" in text


def test_average_others(family, tmp_path) -> None:
    dense, tunes = family
    made(tmp_path / "moe", dense, tunes, "--average-others")
    tensors, own = restored(tmp_path / "moe"), [weights(tune) for tune in tunes]
    for name in (name for name in own[0] if ".mlp." not in name):
        dtype = DTYPES[own[0][name].dtype]
        assert np.array_equal(bits(tensors[name]), mean([bits(t[name]) for t in own], dtype)), name
    made(tmp_path / "full", dense, tunes, "--average-others", "--full")
    assert contents(tmp_path / "moe-plain") == contents(tmp_path / "full")


@pytest.mark.parametrize("delta", ["int4", "rank4", "drop0.5+int4", "none"])
def test_lossy_deltas(family, tmp_path, delta) -> None:
    dense, tunes = family
    made(tmp_path / "moe", dense, tunes, "--delta", delta, "--group-size", 8)
    made(tmp_path / "full", dense, tunes, "--full")
    done("verify", tmp_path / "moe", "-q")
    done("verify", tmp_path / "moe", tmp_path / "full", "-q")  # its errors are those noted at conversion
    base = weights(tmp_path / "moe")["model.layers.0.mlp.experts.gate_proj.base"]
    assert torch.equal(base, weights(dense)[GATE])


def test_recode(family, tmp_path) -> None:
    """An exact upcycled model becomes the int4 one, but for what ders.json says of its way here."""
    dense, tunes = family
    made(tmp_path / "exact", dense, tunes)
    made(tmp_path / "int4", dense, tunes, "--delta", "int4")
    done("compress", tmp_path / "exact", "--delta", "int4", "-o", tmp_path / "recoded", "-q")
    done("verify", tmp_path / "recoded", "-q")
    found, expected = contents(tmp_path / "recoded"), contents(tmp_path / "int4")
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert json.loads(found["ders.json"])["upcycling"] == json.loads(expected["ders.json"])["upcycling"]


def test_layers_and_split(family, tmp_path) -> None:
    """Where a layer gets no experts, the dense FFN stays; a split fine-tune is its slices, down times m."""
    dense, tunes = family
    made(tmp_path / "moe", dense, tunes, "--layers", "1", "--split", 3)
    made(tmp_path / "full", dense, tunes, "--layers", "1", "--split", 3, "--full")
    tensors, of_dense, own = restored(tmp_path / "moe"), weights(dense), weights(tunes[1])
    assert contents(tmp_path / "moe-plain") == contents(tmp_path / "full")
    for layer, source in ((0, of_dense), (1, own)):
        for piece in range(3):
            rows = slice(16 * piece, 16 * piece + 16)
            gate, down = (source[f"model.layers.{layer}.mlp.{p}_proj.weight"] for p in ("gate", "down"))
            assert torch.equal(expert(tensors, layer, 3 + piece, "gate"), gate[rows])
            assert torch.equal(expert(tensors, layer, 3 + piece, "down"), 3 * down[:, rows])


def test_tied_embeddings(tmp_path) -> None:
    toy.dense(tmp_path / "dense", dtype=torch.bfloat16, intermediate_size=INNER, tie_word_embeddings=True)
    tune = perturbed(tmp_path / "dense", tmp_path / "tune", 1)
    assert "lm_head.weight" not in weights(tune)
    made(tmp_path / "moe", tmp_path / "dense", [tune], "--average-others")
    tensors = restored(tmp_path / "moe")
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], weights(tune)["model.embed_tokens.weight"])


def test_nan_in_a_fine_tune(dense, tmp_path) -> None:
    tune = perturbed(dense, tmp_path / "tune", 1)
    tensors = weights(tune)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    tensors["model.norm.weight"][0] = float("inf")
    write(tune, tensors)
    ran = ders("upcycle", dense, "--expert-from", tune, "--delta", "int4", "-o", tmp_path / "moe")
    assert ran.code == 4 and "nan at [3, 5] of expert 0's up matrix" in ran.err
    document = made(tmp_path / "exact", dense, [tune])
    assert document["fine_tunes"][0]["relative"] is None  # JSON has no infinity
    found = expert(restored(tmp_path / "exact"), 1, 0, "up")
    assert found[3, 5].isnan() and torch.equal(bits_of(found), bits_of(tensors["model.layers.1.mlp.up_proj.weight"]))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def _missing(tensors: dict) -> None:
    del tensors["model.norm.weight"]


def _extra(tensors: dict) -> None:
    tensors["value_head.weight"] = torch.zeros(1, HIDDEN)


def _shape(tensors: dict) -> None:
    tensors[GATE] = tensors[GATE][:-1]


def _dtype(tensors: dict) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_missing, "model.norm.weight: expected BF16 [40]"),
        (_extra, "value_head.weight: not in"),
        (_shape, f"{GATE}: expected BF16 [48, 40]"),
        (_dtype, "found F32 [61, 40]"),
    ],
)
def test_not_a_fine_tune(dense, tmp_path, harm, said) -> None:
    tune = perturbed(dense, tmp_path / "tune", 1)
    tensors = weights(tune)
    harm(tensors)
    write(tune, tensors)
    ran = ders("upcycle", dense, "--expert-from", tune, "-o", tmp_path / "moe")
    assert ran.code == 4 and said in ran.err and "is it a fine-tune of this model?" in ran.err
    assert not (tmp_path / "moe").exists() and ran.err.count("\n") == 1


# --- adapters ---


def adapter(
    folder: Path,
    seed: int,
    rank: int | dict[str, int] = 4,
    modules: tuple[str, ...] = ("gate", "up", "down"),
    dtype: torch.dtype = torch.float32,
    layers: tuple[int, ...] = (0, 1),
    **config: object,
) -> Path:
    """A PEFT folder by hand. `rank`: one, or one for each projection."""
    folder.mkdir()
    random, tensors = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        for p in modules:
            out, in_ = (HIDDEN, INNER) if p == "down" else (INNER, HIDDEN)
            r = rank if isinstance(rank, int) else rank[p]
            where = f"base_model.model.model.layers.{layer}.mlp.{p}_proj"
            tensors[f"{where}.lora_A.weight"] = 0.1 * torch.randn(r, in_, generator=random).to(dtype)
            tensors[f"{where}.lora_B.weight"] = 0.1 * torch.randn(out, r, generator=random).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = dict(peft_type="LORA", r=4, lora_alpha=8, bias="none", use_dora=False, init_lora_weights=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def merged(dense: Path, folder: Path, layer: int, p: str, scale: float, m: int = 1, piece: int = 0) -> torch.Tensor:
    """Slow reference: round(m * base + sum over the rank of (m * scale * b_r) a_r), in fp32, one rank after the other."""
    base = weights(dense)[f"model.layers.{layer}.mlp.{p}_proj.weight"]
    tensors = load_file(folder / "adapter_model.safetensors")
    where = f"base_model.model.model.layers.{layer}.mlp.{p}_proj"
    part = slice(piece * INNER // m, (piece + 1) * INNER // m)
    if f"{where}.lora_A.weight" not in tensors:
        delta = torch.zeros(base.shape)
    else:
        a, b = (tensors[f"{where}.lora_{x}.weight"].float() for x in "AB")
        delta = torch.zeros(base.shape)
        left = b * torch.tensor(scale, dtype=torch.float32) * (m if p == "down" else 1)
        for r in range(a.shape[0]):
            delta = delta + left[:, r, None] * a[r]
    if p == "down":
        base, delta = (base.float() * m).to(base.dtype)[:, part], delta[:, part]
    else:
        base, delta = base[part], delta[part]
    return (base.float() + delta).to(base.dtype)


def check_adapters(dense: Path, out: Path, folders: list[Path], scales: list, m: int = 1, *more: object) -> None:
    """Stored as low rank and in full: the same, and both the reference's bits. A scale may be a function of the projection."""
    split = ("--split", m) if m > 1 else ()
    made(out, dense, folders, *split, *more)
    tensors = restored(out)
    for number, (folder, scale) in enumerate(zip(folders, scales, strict=True)):
        for layer in range(2):
            for p in EXPERT:
                for piece in range(m):
                    of = scale(p) if callable(scale) else scale
                    expected = merged(dense, folder, layer, p, of, m, piece)
                    assert torch.equal(expert(tensors, layer, number * m + piece, p), expected), (number, layer, p)
    made(out.with_name("full"), dense, folders, "--full", *split)
    assert contents(out.with_name(f"{out.name}-plain")) == contents(out.with_name("full"))
    done("verify", out, out.with_name("full"), "-q")


def codecs(out: Path) -> dict[str, dict]:
    return {group["name"]: group["codec"] for group in json.loads((out / "ders.json").read_text())["groups"]}


@pytest.mark.parametrize("m", [1, 2, 3])
def test_adapters_of_several_ranks(dense, tmp_path, m) -> None:
    """Ranks 2 and 7, one without gate, in bf16: padded to the largest rank of each matrix."""
    folders = [
        adapter(tmp_path / "a", 1, rank=2, lora_alpha=6),
        adapter(tmp_path / "b", 2, rank=7, modules=("up", "down"), dtype=torch.bfloat16),
    ]
    check_adapters(dense, tmp_path / "moe", folders, [6 / 2, 8 / 7], m)
    ranks = {name.rpartition(".")[2]: codec["rank"] for name, codec in codecs(tmp_path / "moe").items()}
    assert ranks == {"gate_proj": 2, "up_proj": 7, "down_proj": 7}
    assert {codec["dtype"] for codec in codecs(tmp_path / "moe").values()} == {"F32"}
    recipe = json.loads((tmp_path / "moe" / "ders.json").read_text())["recipe"]
    assert (recipe["delta"], recipe["base"]) == ("rank7", "dense:dense")


def test_layers_without_the_adapter(dense, tmp_path) -> None:
    """An adapter on layers that get no experts leaves nothing to store."""
    folders = [adapter(tmp_path / "a", 1, layers=(1,))]
    made(tmp_path / "moe", dense, folders, "--layers", "0")
    assert {codec["codec"] for codec in codecs(tmp_path / "moe").values()} == {"none"}


def test_more_rank_than_the_matrix_has(dense, tmp_path) -> None:
    """A delta of rank 16 on slices of 12 neurons has rank 12; rank 50 on the whole ones has 40."""
    folders = [adapter(tmp_path / "a", 1, rank=50), adapter(tmp_path / "b", 2, rank=16)]
    check_adapters(dense, tmp_path / "moe", folders, [8 / 50, 8 / 16])
    shutil.rmtree(tmp_path / "full")
    check_adapters(dense, tmp_path / "fine", folders, [8 / 50, 8 / 16], 4)


def test_no_adapter_on_a_projection(dense, tmp_path) -> None:
    folders = [adapter(tmp_path / "a", 1, modules=("down",))]
    check_adapters(dense, tmp_path / "moe", folders, [2.0])
    assert {n.rpartition(".")[2]: c["codec"] for n, c in codecs(tmp_path / "moe").items()} == {
        "gate_proj": "none",
        "up_proj": "none",
        "down_proj": "rank",
    }


def test_scales(dense, tmp_path) -> None:
    """rsLoRA; alpha by pattern, of which the first that matches the end of a module's path counts; rank from the shapes."""
    pattern = {"mlp.gate_proj": 3, r"layers\.\d+\.mlp\.(gate|up)_proj": 5}
    folders = [
        adapter(tmp_path / "rs", 1, use_rslora=True),
        adapter(tmp_path / "pattern", 2, alpha_pattern=pattern),
        adapter(tmp_path / "shapes", 3, rank=dict(gate=1, up=2, down=3), rank_pattern={"gate_proj": 1}, r=99),
    ]
    by_pattern, by_shape = dict(gate=3 / 4, up=5 / 4, down=8 / 4), dict(gate=8 / 1, up=8 / 2, down=8 / 3)
    check_adapters(dense, tmp_path / "moe", folders, [8 / 2, by_pattern.get, by_shape.get])


def test_mixed_with_a_fine_tune(dense, tmp_path) -> None:
    donors = [adapter(tmp_path / "a", 1), perturbed(dense, tmp_path / "tune", 3)]
    made(tmp_path / "moe", dense, donors)
    made(tmp_path / "full", dense, donors, "--full")
    tensors = restored(tmp_path / "moe")
    assert contents(tmp_path / "moe-plain") == contents(tmp_path / "full")
    assert torch.equal(expert(tensors, 1, 0, "up"), merged(dense, donors[0], 1, "up", 2.0))
    assert torch.equal(expert(tensors, 1, 1, "up"), weights(donors[1])["model.layers.1.mlp.up_proj.weight"])
    assert {codec["codec"] for codec in codecs(tmp_path / "moe").values()} == {"exact"}


def test_no_trace_of_where_donors_stood(dense, tmp_path) -> None:
    """The same bytes from other folders of the same names."""
    (tmp_path / "here").mkdir()
    one = adapter(tmp_path / "here" / "a", 1)
    made(tmp_path / "moe", dense, [one])
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    made(tmp_path / "again", dense, [tmp_path / "there" / "a"])
    assert contents(tmp_path / "moe") == contents(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "moe" / "ders.json").read_text()


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        (dict(use_dora=True), 4, "use_dora is True"),
        (dict(bias="all"), 4, "bias is 'all'"),
        (dict(lora_bias=True), 4, "lora_bias is True"),
        (dict(modules_to_save=["lm_head"]), 4, "modules_to_save"),
        (dict(init_lora_weights="pissa_niter_4"), 4, "init_lora_weights is 'pissa_niter_4'"),
        (dict(layer_replication=[[0, 2], [1, 2]]), 4, "layer_replication"),
        (dict(alora_invocation_tokens=[1]), 4, "alora_invocation_tokens"),
        (dict(peft_type="IA3"), 4, "peft_type is 'IA3'"),
        (dict(lora_alpha=None), 4, "lora_alpha: expected a number, found None"),
        (dict(lora_alpha=float("inf")), 4, "lora_alpha: expected a number, found inf"),
        (dict(lora_alpha=1e40), 4, "not finite"),
        (dict(alpha_pattern={"(": 3}), 4, "alpha_pattern: expected names and numbers"),
        (dict(alpha_pattern=[3]), 4, "alpha_pattern: expected names and numbers"),
        (dict(alpha_pattern={"up_proj": "x"}), 4, "expected a number, found 'x'"),
    ],
)
def test_adapter_settings_that_are_refused(dense, tmp_path, config, code, said) -> None:
    ran = ders("upcycle", dense, "--expert-from", adapter(tmp_path / "a", 1, **config), "-o", tmp_path / "moe")
    assert ran.code == code and said in ran.err and ran.err.count("\n") == 1


def _rename(folder: Path, old: str, new: str | None, change=lambda tensor: tensor) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensor = tensors.pop(old)
    if new:
        tensors[new] = change(tensor)
    save_file(tensors, folder / "adapter_model.safetensors")


A0 = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("new", "change", "said"),
    [
        (A0.replace("mlp.up", "self_attn.q"), None, "which is no FFN projection"),
        (A0.replace("lora_A.weight", "lora_magnitude_vector"), None, "no LoRA factor"),
        (A0.replace("layers.0", "layers.2"), None, "which is no FFN projection"),
        (None, None, "expected factors [48, r] and [r, 40]"),
        (A0, lambda t: t[:, :-1].contiguous(), "of at most 1024, found [4, 39]"),
        (A0, lambda t: t[:-1].contiguous(), "expected factors"),
        (A0, lambda t: t[0].contiguous(), "expected a matrix"),
        (A0, lambda t: t[:0].contiguous(), "expected a matrix"),
        (A0, lambda t: t.to(torch.int8), "expected BF16, F16, F32, found I8"),
        (A0, lambda t: t / 0, "not finite"),
    ],
)
def test_adapter_files_that_are_refused(dense, tmp_path, new, change, said) -> None:
    folder = adapter(tmp_path / "a", 1)
    _rename(folder, A0, new, change or (lambda tensor: tensor))
    ran = ders("upcycle", dense, "--expert-from", folder, "-o", tmp_path / "moe")
    assert ran.code == 4 and said in ran.err and ran.err.count("\n") == 1


def test_past_the_range_of_the_dtype(tmp_path) -> None:
    """An fp16 model whose merged expert is infinite: refused in both forms, not written."""
    toy.dense(tmp_path / "dense", dtype=torch.float16, intermediate_size=INNER)
    folder = adapter(tmp_path / "a", 1, lora_alpha=1e8)
    for form in ((), ("--full",)):
        ran = ders("upcycle", tmp_path / "dense", "--expert-from", folder, "-o", tmp_path / "moe", *form)
        assert ran.code == 4 and "F16" in ran.err and not (tmp_path / "moe").exists()
        shutil.rmtree(tmp_path / "moe.partial")


def test_other_adapter_troubles(dense, tmp_path) -> None:
    folder = adapter(tmp_path / "a", 1)
    assert ders("upcycle", dense, "--expert-from", folder, "--average-others", "-o", tmp_path / "m").code == 2
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    ran = ders("upcycle", dense, "--expert-from", folder, "-o", tmp_path / "m")
    assert ran.code == 4 and "save the adapter as safetensors" in ran.err
    save_file({}, folder / "adapter_model.safetensors")
    ran = ders("upcycle", dense, "--expert-from", folder, "-o", tmp_path / "m")
    assert ran.code == 4 and "has no LoRA factors" in ran.err
    (folder / "adapter_config.json").write_text("[1]")
    ran = ders("upcycle", dense, "--expert-from", folder, "-o", tmp_path / "m")
    assert ran.code == 4 and "expected a JSON object" in ran.err
    assert ders("upcycle", dense, "--expert-from", tmp_path / "none", "-o", tmp_path / "m").code == 2
    (tmp_path / "empty").mkdir()
    assert ders("upcycle", dense, "--expert-from", tmp_path / "empty", "-o", tmp_path / "m").code == 4


# --- what must not be mixed or lost ---


def test_another_form_does_not_resume(dense, tmp_path, monkeypatch) -> None:
    """Factors as they are, and the same adapters coded by rank3, have one recipe; a broken-off run of one is not the other's."""
    folders = [adapter(tmp_path / "a", 1, rank=3), adapter(tmp_path / "b", 2, rank=3)]
    flags = [flag for folder in folders for flag in ("--expert-from", folder)]
    with monkeypatch.context() as patched:
        patched.setattr(convert, "publish", stop)
        assert ders("upcycle", dense, *flags, "-o", tmp_path / "moe", "-q").code == 1
    ran = ders("upcycle", dense, *flags, "--delta", "rank3", "-o", tmp_path / "moe", "--resume", "-q")
    assert (ran.code, "another codecs" in ran.err) == (2, True)
    done("upcycle", dense, *flags, "-o", tmp_path / "moe", "--resume", "-q")


def stop(*_: object) -> None:
    raise DersError("stopped")


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_average_leaves_every_ffn(tmp_path, model_type) -> None:
    """With --layers 0, layer 1's FFN is the dense model's, whether the MoE keeps it dense or as copies."""
    folder = tmp_path / "dense"
    toy.dense(folder, model_type, head_dim=10)
    donors = [perturbed(folder, tmp_path / "one", 1), perturbed(folder, tmp_path / "two", 2)]
    made(tmp_path / "moe", folder, donors, "--layers", "0", "--average-others")
    plain, before = restored(tmp_path / "moe"), load_file(folder / "model.safetensors")
    ffn = before["model.layers.1.mlp.up_proj.weight"]
    name = next(n for n in plain if n.startswith("model.layers.1.") and ("up_proj" in n or "experts.0.w3" in n))
    assert torch.equal(plain[name], ffn)
    assert not torch.equal(plain["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_alpha_of_no_size(dense, tmp_path) -> None:
    folder = adapter(tmp_path / "a", 1, lora_alpha=10**400)
    ran = ders("upcycle", dense, "--expert-from", folder, "-o", tmp_path / "moe")
    assert (ran.code, "lora_alpha" in ran.err) == (4, True)
