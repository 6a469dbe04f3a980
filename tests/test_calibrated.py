"""Deltas fitted to what experts see: the arithmetic against slow references, and whole conversions of tiny models."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from blake3 import blake3
from command import contents, ders, done
from ders_kernels.cpu_ops import floats, lowrank
from safetensors.torch import load_file, save_file

from ders_cli import calibrated, convert, convert_group
from ders_cli.activations import Activations
from ders_cli.calibrated import gptq, whitened
from ders_cli.calibration import LEAST, make_encoder
from ders_cli.codecs.integers import IntCodec
from ders_cli.codecs.rank import RankCodec
from ders_cli.errors import DersError, UsageError
from ders_cli.output import Options
from ders_cli.recipe import make_recipe
from ders_cli.source import open_source

TOKENS = 200


def together(tokens: int, width: int, seed: int) -> np.ndarray:
    """fp32 inputs [tokens, width] that go together: a few directions have most of the energy, as hidden states have."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((width, width)) * 4 / (1 + np.arange(width))
    return (random.standard_normal((tokens, width)) @ mixing.T).astype(np.float32)


def sparse(out: int, width: int, seed: int) -> np.ndarray:
    """A delta as bf16 fine-tuning leaves it: many zeros, and a row of nothing else."""
    random = np.random.default_rng(seed)
    delta = random.standard_normal((out, width)) * (random.random((out, width)) < 0.6) * 1e-3
    delta[out // 2] = 0
    return delta.astype(np.float32)


def in_outputs(error: np.ndarray, hessian: np.ndarray) -> float:
    """sqrt(tr(E H E')): the length of the outputs' error."""
    return float(np.sqrt(np.einsum("ij,jk,ik->", error.astype(np.float64), hessian, error.astype(np.float64))))


# --- integers


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("out, width, group", [(1, 1, 4), (3, 61, 16), (7, 150, 64), (4, 130, 7), (5, 20, 128)])
def test_blocks_give_what_elimination_gives(bits: int, out: int, width: int, group: int) -> None:
    codec, delta = IntCodec(bits, group), sparse(out, width, bits)
    hessian = calibrated.moment(together(3 * width, width, 7))
    coded = codec.decode(gptq.encode(codec, delta, hessian, 5), delta.shape, 5, 0)
    expected = gptq.reference(codec, delta, hessian, 5)
    # fp32 and fp64 may round a target apart that stands between two levels, and all that follows in its row
    rows = np.isclose(coded, expected, rtol=1e-6, atol=0).all(axis=1)
    assert rows.mean() >= 0.75
    assert in_outputs(coded - delta, hessian) == pytest.approx(in_outputs(expected - delta, hessian), rel=0.02)


@pytest.mark.parametrize("bits", range(1, 9))
def test_white_inputs_give_the_plain_bytes(bits: int) -> None:
    codec, delta = IntCodec(bits, 32), sparse(6, 150, bits)
    parts, plain = gptq.encode(codec, delta, 3 * np.eye(150), 9), codec.encode(delta, 9, 0)
    assert all(np.array_equal(parts[name], plain[name]) for name in plain)


@pytest.mark.parametrize("bits, least", [(4, 0.92), (3, 0.9), (2, 0.8), (1, 0.8)])
def test_outputs_err_less_and_scales_stay(bits: int, least: float) -> None:
    codec, delta = IntCodec(bits, 64), sparse(40, 192, 3)
    hessian = calibrated.moment(together(400, 192, 4))
    parts, plain = gptq.encode(codec, delta, hessian, 1), codec.encode(delta, 1, 0)
    assert np.array_equal(parts["scale"], plain["scale"])
    errors = [in_outputs(codec.decode(p, delta.shape, 1, 0) - delta, hessian) for p in (parts, plain)]
    assert errors[0] < least * errors[1]  # measured: 0.86, 0.81, 0.71, 0.69 of it


def test_the_delta_keeps_its_size_in_the_outputs() -> None:
    """No gain is corrected, and none has to be: least squares would keep 1 - error^2, 0.93 of this one at 2 bits."""
    delta = sparse(200, 192, 3) ** 3 * 1e6
    x = together(2000, 192, 4)
    hessian, y = calibrated.moment(x), x @ delta.T
    for bits in (3, 2):
        codec = IntCodec(bits, 64)
        coded = x @ codec.decode(gptq.encode(codec, delta, hessian, 1), delta.shape, 1, 0).T
        assert float((coded * y).sum() / (y * y).sum()) == pytest.approx(1, abs=0.04)


def test_numbers_that_pass_fp32_are_coded_plain() -> None:
    codec, delta = IntCodec(4, 32), (sparse(3, 64, 0).astype(np.float64) * 1e41).clip(-3e38, 3e38).astype(np.float32)
    hessian = calibrated.moment(together(400, 64, 4))
    hessian = hessian + 1e3 * np.mean(np.diag(hessian)) * np.ones_like(hessian)
    parts, plain = gptq.encode(codec, delta, hessian, 1), codec.encode(delta, 1, 0)
    assert set(parts) == set(plain)


def test_inputs_of_zero_code_plain() -> None:
    assert np.array_equal(calibrated.moment(np.zeros((20, 5), np.float32)), np.eye(5))


# --- low rank


def test_whitened_error_is_the_tail_of_the_singular_values() -> None:
    codec, delta = RankCodec(12, "F32"), sparse(24, 20, 1)
    hessian = calibrated.moment(together(60, 20, 2))
    parts = whitened.encode(codec, delta, hessian, 3)
    error = in_outputs(codec.decode(parts, delta.shape, 3, 0) - delta, hessian)
    values = np.linalg.svd(delta @ np.linalg.cholesky(hessian), compute_uv=False)
    assert error == pytest.approx(
        np.sqrt((values[12:] ** 2).sum()), rel=1e-4
    )  # factors are fp32; all directions are probed
    left, right = lowrank.factors(delta, 12, 3)
    assert error < 0.9 * in_outputs(left @ right - delta, hessian)


def test_white_inputs_give_the_plain_factors() -> None:
    codec, delta = RankCodec(4, "F32"), sparse(24, 20, 1)
    coded = codec.decode(whitened.encode(codec, delta, 7 * np.eye(20), 3), delta.shape, 3, 0)
    plain = codec.decode(codec.encode(delta, 3, 0), delta.shape, 3, 0)
    np.testing.assert_allclose(coded, plain, atol=1e-6 * np.abs(plain).max())  # fp32 products by 1


# --- whole conversions


def model(folder: Path, name: str = "mixtral", dtype: torch.dtype = torch.bfloat16, **more) -> Path:
    toy.make(name, folder, dtype=dtype, **more)
    return folder


def states_of(folder: Path, path: Path, chosen: list[int] | None = None, shared: bool = False) -> Path:
    """Activations for every layer of a model; `chosen`: experts that tokens are routed to by turns, two each."""
    tensors = {}
    with open_source(folder, shared) as source:
        for group in source.groups:
            if group.projection == "down":
                prefix = group.name.rpartition(".")[0]
                tensors[f"{prefix}.states"] = torch.from_numpy(together(TOKENS, group.shape[0], group.layer))
                if chosen is not None:
                    first = torch.tensor(chosen, dtype=torch.int32).repeat(TOKENS)[:TOKENS]
                    tensors[f"{prefix}.chosen"] = torch.stack([first, first], 1).contiguous()
    save_file(tensors, path)
    return path


def output_errors(original: Path, packed: Path, states: Path, shared: bool = False) -> float:
    """Root mean square of the matrices' output errors, on the states that they were fitted to."""
    with open_source(original, shared) as source, open_source(packed) as coded, Activations(states) as seen:
        encoder = make_encoder(source, make_recipe({"delta": "int4"}), seen, quiet=True)
        errors = []
        named = {group.name: group for group in coded.groups}
        for group, other in ((group, named[group.name]) for group in source.groups):
            for member, (label, _) in enumerate(group.members):
                with np.errstate(over="ignore"):
                    x = encoder._inputs(group, label)
                rows = slice(0, group.shape[0])
                weights = [
                    floats.widen(s.read(g, member, rows), group.dtype) for s, g in ((source, group), (coded, other))
                ]
                errors.append(np.linalg.norm(x @ (weights[0] - weights[1]).T) ** 2)
        return float(np.sqrt(np.mean(errors)))


CASES = {
    "mixtral": dict(name="mixtral"),
    "stacked f32": dict(name="qwen3_moe", fused=True, dtype=torch.float32),
    "f16": dict(name="olmoe", dtype=torch.float16),
    "no gate": dict(name="nemotron_h"),
    "transposed, interleaved": dict(name="gpt_oss"),
    "flattened": dict(name="dbrx"),
}


@pytest.mark.parametrize(
    "case, delta", [*((case, "int3") for case in CASES), ("mixtral", "rank8"), ("no gate", "rank8")]
)
def test_conversions_err_less(case: str, delta: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "m", **CASES[case])
    states = states_of(folder, tmp_path / "a")
    common = ("compress", folder, "--delta", delta, "--group-size", 16)
    done(*common, "-o", tmp_path / "plain")
    done(*common, "-o", tmp_path / "fitted", "--activations", states)
    done("verify", tmp_path / "fitted", "--against", folder)
    plain, fitted = (output_errors(folder, tmp_path / name, states) for name in ("plain", "fitted"))
    assert fitted < 0.9 * plain  # of a delta of full rank, rank 8 of 40 gains least: 0.83
    sizes = [{name: len(data) for name, data in contents(tmp_path / f).items()} for f in ("plain", "fitted")]
    assert sizes[0].keys() == sizes[1].keys() and sizes[0]["config.json"] == sizes[1]["config.json"]
    label = json.loads((tmp_path / "fitted" / "ders.json").read_text())["calibration"]
    assert label["tokens"] == TOKENS and label["plain"] == {} and len(label["activations"]) == 64


def test_shared_experts_see_every_token(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", "qwen2_moe")
    states = states_of(folder, tmp_path / "a", [0, 1], shared=True)
    with open_source(folder, shared=True) as source, Activations(states) as seen:
        encoder = make_encoder(source, make_recipe({"delta": "int3", "shared": True}), seen, quiet=True)
        up = next(group for group in source.groups if group.projection == "up")
        assert [len(encoder._inputs(up, label)) for label in ("0", "shared")] == [TOKENS // 2, TOKENS]
        assert encoder.label["plain"] == {f"model.layers.{layer}.mlp.experts": ["2"] for layer in (0, 1)}
    done("compress", folder, "--delta", "int3", "--shared", "--activations", states, "-o", tmp_path / "out")
    done("verify", tmp_path / "out", "--against", folder)


def test_what_goes_into_down_is_what_the_model_makes(tmp_path: Path) -> None:
    made = toy.make("qwen3_moe", tmp_path / "m")
    states = states_of(tmp_path / "m", tmp_path / "a")
    with open_source(tmp_path / "m") as source, Activations(states) as seen:
        encoder = make_encoder(source, make_recipe({"delta": "int3"}), seen, quiet=True)
        down = next(group for group in source.groups if group.projection == "down" and group.layer == 1)
        x = torch.from_numpy(seen.layer("model.layers.1.mlp.experts", ["0", "1", "2", "3", "4"]).states)
        experts = dict(toy.experts(made))
        gate, up = (experts[f"model.layers.1.mlp.experts.{p}_proj"][3].float() for p in ("gate", "up"))
        expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        largest = float(expected.detach().abs().max())
        np.testing.assert_allclose(encoder._inputs(down, "3"), expected.detach().numpy(), atol=1e-6 * largest)


def test_same_bytes_with_any_threads_blocks_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "m", "qwen3_moe")
    states = states_of(folder, tmp_path / "a", [0, 1, 2, 3, 4])
    common = ("compress", folder, "--delta", "int2", "--group-size", 16, "--activations", states)
    done(*common, "-o", tmp_path / "one", "-j", 1)
    done(*common, "-o", tmp_path / "three", "-j", 3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    monkeypatch.setattr(convert_group, "BLOCK_WEIGHTS", 400)  # ten rows
    done(*common, "-o", tmp_path / "blocks", "-j", 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "blocks")
    done(*common, "-o", tmp_path / "shards", "-j", 3, "--max-shard-size", "40KB")
    shards = {n: t for p in (tmp_path / "shards").glob("*.safetensors") for n, t in load_file(p).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1 and shards.keys() == whole.keys()
    assert all(torch.equal(shards[name], whole[name]) for name in whole)


def test_experts_that_few_tokens_are_routed_to_stay_plain(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", num_hidden_layers=1)
    states = states_of(folder, tmp_path / "a", [1] * (LEAST - 1) + [0, 2] * TOKENS)
    common = ("compress", folder, "--delta", "int3", "--group-size", 16)
    done(*common, "-o", tmp_path / "plain")
    ran = done(*common, "-o", tmp_path / "fitted", "--activations", states)
    assert f"1 of 3 experts are coded plain: fewer than {LEAST} tokens" in ran.err
    label = json.loads((tmp_path / "fitted" / "ders.json").read_text())["calibration"]
    assert label["plain"] == {"model.layers.0.mlp.experts": ["1"]}
    plain, fitted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fitted"))
    for name in (name for name in plain if name.endswith("codes")):
        assert [torch.equal(plain[name][i], fitted[name][i]) for i in range(3)] == [False, True, False]
    scales = [name for name in plain if name.endswith("scale")]
    assert len(scales) == 3 and all(torch.equal(plain[name], fitted[name]) for name in scales)


def test_other_codecs_are_left_alone(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    states = states_of(folder, tmp_path / "a")
    rules = "delta: int3\nrules:\n  - {experts: [1], delta: exact}\n  - {projections: [gate], delta: drop0.5+int4}\n"
    (tmp_path / "r.yaml").write_text(rules)
    common = ("compress", folder, "--recipe", tmp_path / "r.yaml")
    done(*common, "-o", tmp_path / "plain")
    ran = done(*common, "-o", tmp_path / "fitted", "--activations", states)
    assert "drop0.5+int4, exact are coded as ever" in ran.err or "exact, drop0.5+int4 are coded as ever" in ran.err
    done("verify", tmp_path / "fitted", "--against", folder)
    plain, fitted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fitted"))
    differ = {name.split(".delta.")[1].split(".")[-1] for name in plain if not torch.equal(plain[name], fitted[name])}
    assert differ == {"codes"} and not any("gate_proj" in n for n in plain if not torch.equal(plain[n], fitted[n]))


def test_the_file_is_named_by_its_hash(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    states = states_of(folder, tmp_path / "a")
    done("compress", folder, "--delta", "int3", "--activations", states, "-o", tmp_path / "o")
    label = json.loads((tmp_path / "o" / "ders.json").read_text())["calibration"]
    assert label["activations"] == blake3(states.read_bytes()).hexdigest()
    assert set(label) == {"activations", "tokens", "damping", "plain"}


def test_what_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    states = states_of(folder, tmp_path / "a")
    ran = ders("compress", folder, "--delta", "ternary0.1", "--activations", states, "-o", tmp_path / "o")
    assert ran.code == 2 and "calibration fits int8 ... int1 and rankR; the recipe has ternary0.1" in ran.err
    ran = ders("compress", folder, "--delta", "int3", "--activations", folder / "config.json", "-o", tmp_path / "o")
    assert ran.code == 4 and "not safetensors" in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("change", ["written to", "replaced", "vanished"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, change: str) -> None:
    folder = model(tmp_path / "m")
    states, recipe = states_of(folder, tmp_path / "a"), make_recipe({"delta": "int3"})
    with open_source(folder) as source, Activations(states) as seen:
        encoder = make_encoder(source, recipe, seen, quiet=True)
        conversion = convert.prepare(source, recipe, tmp_path / "o", Options(), encoder=encoder)
        conversion.check_unchanged()
        if change == "written to":
            os.utime(states, ns=(0, 0))
        elif change == "replaced":
            states.rename(tmp_path / "b")
            (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes())
        else:
            states.unlink()
        with pytest.raises(DersError, match=f"a: .*{change}.* since it was opened"):
            convert.run(conversion)
    assert not (tmp_path / "o").exists()


def test_memory_is_counted(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    states, recipe = states_of(folder, tmp_path / "a"), make_recipe({"delta": "int3"})
    with open_source(folder) as source, Activations(states) as seen:
        encoder = make_encoder(source, recipe, seen, quiet=True)
        plain = convert.prepare(source, recipe, tmp_path / "o", Options())
        fitted = convert.prepare(source, recipe, tmp_path / "o", Options(), encoder=encoder)
        least, more = (each.totals()["peak_memory_bytes"] for each in (plain, fitted))
        assert more - least >= 24 * toy.INNER**2 + 12 * TOKENS * toy.INNER
        tight = Options(max_memory=more - 1)
        convert.prepare(source, recipe, tmp_path / "o", tight)
        with pytest.raises(UsageError, match="one thread needs about"):
            convert.prepare(source, recipe, tmp_path / "o", tight, encoder=encoder)


def test_a_remote_model_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    states = states_of(folder, tmp_path / "a")
    with open_source(folder) as source, Activations(states) as seen:
        source.reader.address = "hf://someone/model"
        with pytest.raises(UsageError, match="copy the model here first"):
            make_encoder(source, make_recipe({"delta": "int3"}), seen)


def test_an_activation_that_nobody_knows(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    states = states_of(folder, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text()) | {"hidden_act": "softplus"}
    (folder / "config.json").write_text(json.dumps(config))
    ran = ders("compress", folder, "--delta", "int3", "--activations", states, "-o", tmp_path / "o")
    assert ran.code == 4 and "activation 'softplus'" in ran.err and not (tmp_path / "o.partial").exists()


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    states = states_of(folder, tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("experts.1.w3.weight"))
    tensors[name][2, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ran = ders("compress", folder, "--delta", "int3", "--activations", states, "-o", tmp_path / "o")
    assert ran.code == 4 and "nan at [2, 3] of expert 1's up matrix" in ran.err
