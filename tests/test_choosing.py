"""What stands between options and the walk: refusals before minutes are spent, names, notes, inputs that are spared."""

from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from command import ders, done

from ders_cli.activations import write_activations
from ders_cli.checkpoint.manifest import write_file
from ders_cli.choosing import Choosing
from ders_cli.source import open_source


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choosing") / "tiny"
    toy.make("mixtral", folder, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words of a text\n" * 50)
    return tmp_path / "text.txt"


@pytest.fixture
def seen(model: Path, tmp_path: Path) -> Path:
    """What the experts would see: random states."""
    path, made = tmp_path / "seen.safetensors", {}
    with open_source(model) as source:
        for group in source.groups:
            if group.projection == "up":
                states = np.random.default_rng(0).standard_normal((64, group.shape[1]), np.float32)
                made[f"{group.name.rpartition('.')[0]}.states"] = (states, "F32")
    write_activations(path, made)
    return path


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--delta", "exact"], "calibration fits int8 ... int1 and rankR; the recipe has exact"),
        (["--delta", "rank4+int2"], "calibration fits"),
        (["--budget", "3bpw", "--delta", "foo"], "foo"),
        (["--budget", "3bpw", "--delta", "int4,none"], "none changes the size of deltas"),
        (["--budget", "3bpw", "--delta", ""], "''"),
        (["--max-loss", "0.01", "--delta", "rank"], "low rank shrinks deltas"),
    ],
)
def test_refused_before_the_model_runs(model: Path, text: Path, arguments: list[str], said: str) -> None:
    """It has no tokenizer: had the model been loaded, that would be the error."""
    assert "no tokenizer" in ders("compress", model, "--calibrate", text, "--delta", "int4").err
    for more in ([], ["--dry-run"]):
        ran = ders("compress", model, "--calibrate", text, *arguments, *more)
        assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1, ran.err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--budget", "1bpw", "--max-loss", "0.1"], "--budget and --max-loss: expected one of the two"),
        (["--budget", "1bpw", "--recipe", "onebit"], "--recipe onebit and a budget: expected one of the two"),
        (["--budget", "much"], "--budget 'much': expected bits per delta weight"),
        (["--budget", "9" * 20 + "TB"], "expected bits per delta weight"),
        (["--budget", "1" * 400 + "bpw"], "expected bits per delta weight"),
        (["--budget", "10001bpw"], "expected bits per delta weight"),
        (["--max-loss", "1e300"], "--max-loss 1e+300: expected a relative error"),
        (["--max-loss", "nan"], "--max-loss nan: expected a relative error"),
        (["--tokens", "5"], "--tokens: says how much of --calibrate's text is used"),
        (["--calibrate", "nothing.txt"], "--calibrate nothing.txt: no such file"),
        (["--calibrate", "."], "--calibrate .: expected a file"),
    ],
)
def test_contradictions(model: Path, arguments: list[str], said: str) -> None:
    ran = ders("compress", model, *arguments)
    assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1, ran.err


def test_batches_take_none_of_it(model: Path) -> None:
    for arguments in (["--budget", "1bpw"], ["--align"], ["--tokens", "5"]):
        ran = ders("compress", "--batch", f"{model.parent}/*", *arguments)
        assert ran.code == 2 and f"{arguments[0]}" in ran.err


def test_both_texts_and_files(model: Path, text: Path, seen: Path) -> None:
    ran = ders("compress", model, "--calibrate", text, "--activations", seen)
    assert ran.code == 2 and "--calibrate and --activations: expected one of the two" in ran.err


def test_inputs_in_the_output_are_spared(model: Path, seen: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    done("compress", model, "--delta", "int4", "-o", old)
    kept = old / "seen.safetensors"
    kept.write_bytes(seen.read_bytes())
    ran = ders("compress", model, "--delta", "int3", "--activations", kept, "-o", old, "--overwrite")
    assert ran.code == 2 and f"the input {kept} stands there" in ran.err and kept.exists()


def test_names() -> None:
    assert Choosing().ending("-ders-int3") == "-ders-int3"
    assert Choosing(align=True, calibrate=Path("x")).ending("-ders-int3") == "-ders-int3-aligned-calibrated"
    assert Choosing(budget="0.5 bpw").ending("-ders-int4") == "-ders-0.5bpw"
    assert Choosing(max_loss=0.01, activations=Path("x")).ending("-ders-int4") == "-ders-loss0.01-calibrated"


def test_what_a_dry_run_leaves_out_is_said(model: Path, text: Path, seen: Path) -> None:
    ran = done("compress", model, "--delta", "int3", "--calibrate", text, "--dry-run")
    assert "note: --dry-run does not run the model" in ran.err
    assert "note" not in done("compress", model, "--delta", "int3", "--activations", seen, "--dry-run").err


def test_a_plan_of_which_nothing_is_fitted_says_so(model: Path, seen: Path, tmp_path: Path) -> None:
    ran = done(
        "compress", model, "--budget", "40bpw", "--delta", "exact", "--activations", seen, "-o", tmp_path / "out"
    )
    assert "nothing that is fitted" in ran.err
    fitted = done("compress", model, "--budget", "5bpw", "--delta", "int4", "--activations", seen, "-o", tmp_path / "o")
    assert "nothing that is fitted" not in fitted.err


def test_a_recipe_where_a_folder_stands(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path / "folder", b"delta: int4\n")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
