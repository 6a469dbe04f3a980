"""`ders compress --batch`: lists and globs, skipping, resuming, failures, interrupts."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import contents, ders, done

from ders_cli import batch, convert
from ders_cli.checkpoint.reader import read_header
from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.checkpoint.writer import ShardWriter
from ders_cli.errors import Interrupted


def make(folder: Path, seed: int, layers: int = 2) -> Path:
    """A small MoE in qwen3_moe's form; other seeds, other weights of the same names and shapes."""
    specs = {"model.embed_tokens.weight": TensorSpec((5, 8), "BF16")}
    for layer in range(layers):
        for expert in range(3):
            for name in ("gate", "up", "down"):
                specs[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = TensorSpec((8, 8), "BF16")
    folder.mkdir(parents=True)
    writer, random = ShardWriter(folder / "model.safetensors", specs), np.random.default_rng(seed)
    for name, spec in specs.items():
        writer.write(name, 0, random.integers(0x3F00, 0x3F40, spec.size).astype(np.uint16))
    writer.close()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": 3}))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """models/a, models/b, models/c"""
    for seed, name in enumerate("abc"):
        make(tmp_path / "models" / name, seed)
    return tmp_path / "models"


def write_list(models: Path, *lines: str) -> Path:
    path = models.parent / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_gives_what_single_commands_give(models: Path, tmp_path: Path) -> None:
    make(tmp_path / "with space", 7)
    own = tmp_path / "own place"
    listed = write_list(
        models, "# first", "", f"{models}/a  # a comment", f"'{tmp_path}/with space'", f'{models}/b "{own}"'
    )
    ran = done("compress", "--batch", listed, "--delta", "int3", "--group-size", 4)
    for model, out in (
        (models / "a", models / "a-ders-int3"),
        (tmp_path / "with space", tmp_path / "with space-ders-int3"),
        (models / "b", own),
    ):
        done("compress", model, "--delta", "int3", "--group-size", 4, "-o", tmp_path / "single", "--overwrite", "-q")
        assert contents(out) == contents(tmp_path / "single")
    assert [line.split(":")[1].split()[0] for line in ran.err.splitlines()] == ["1/3", "2/3", "3/3"]
    assert ran.out.count("int3") == 2 and not (models / "c-ders-int3").exists()


def test_a_glob_leaves_out_what_ders_wrote(models: Path) -> None:
    (models / "notes.txt").write_text("no model")
    (models / "empty").mkdir()
    make(models / "d.partial", 3)
    first = done("compress", "--batch", f"{models}/*", "--json").json
    assert [Path(each["model"]).name for each in first["batch"]] == ["a", "b", "c"]
    again = done("compress", "--batch", f"{models}/*", "--json").json
    assert [each["skipped"] for each in again["batch"]] == [True] * 3
    for before, after in zip(first["batch"], again["batch"], strict=True):
        different = ("seconds", "skipped")
        assert {k: v for k, v in before.items() if k not in different} == {
            k: v for k, v in after.items() if k not in different
        }


def test_a_glob_leaves_out_an_output_that_was_being_replaced(models: Path) -> None:
    (models / "c").rename(models / "c.ders-replaced")  # killed between two renames: the old output, a plain one
    found = done("compress", "--batch", f"{models}/*", "--dry-run", "--json").json
    assert [Path(each["model"]).name for each in found["batch"]] == ["a", "b"]


def test_a_stranger_s_names_move_no_cursor(models: Path) -> None:
    (models / "b").rename(models / "b\x1b[2J")
    (models / "c" / "config.json").write_text('{"model_type": "\x1b]0;title\x07"}')
    ran = ders("compress", "--batch", f"{models}/*")
    assert "b\\x1b[2J: done" in ran.err and all(letter.isprintable() or letter == "\n" for letter in ran.err + ran.out)


def test_output_folder(models: Path, tmp_path: Path) -> None:
    listed = write_list(models, f"{models}/a", f"{models}/b named", f"{models}/c {tmp_path}/apart")
    ran = done("compress", "--batch", listed, "-o", tmp_path / "small", "-q")
    outputs = [tmp_path / "small" / "a-ders-int4", tmp_path / "small" / "named", tmp_path / "apart"]
    assert ran.out.split() == [str(path) for path in outputs] and not ran.err
    assert all((path / "ders.json").is_file() for path in outputs)


def test_a_failure_does_not_stop_the_others(models: Path) -> None:
    (models / "b" / "config.json").write_text('{"model_type": "llama"}')
    (models / "b" / "model.safetensors").write_bytes(b"no header")
    ran = ders("compress", "--batch", write_list(models, f"{models}/nowhere", f"{models}/b", f"{models}/c"), "--json")
    assert ran.code == 1
    assert [each["exit_code"] for each in ran.json["batch"]] == [2, 4, 0]
    assert "no such folder" in ran.json["batch"][0]["error"]["message"]
    assert "2/3" in ran.err and (models / "c-ders-int4" / "ders.json").is_file()
    table = ders("compress", "--batch", write_list(models, f"{models}/nowhere", f"{models}/c"))
    assert table.code == 1 and "no such folder" in table.out and "already done" in table.out


def test_a_fault_of_ders_does_not_stop_the_others(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = convert.run

    def run(conversion: convert.Conversion) -> dict:
        if conversion.out.name.startswith("a"):
            raise RuntimeError("broken")
        return real(conversion)

    monkeypatch.setattr(convert, "run", run)
    ran = ders("compress", "--batch", f"{models}/*", "--json")
    assert ran.code == 1 and [each["exit_code"] for each in ran.json["batch"]] == [1, 0, 0]
    assert "Traceback" in ran.err and ran.json["batch"][0]["error"]["message"] == "RuntimeError: broken"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "names no model"),
        (["# nothing"], "names no model"),
        (["a b c"], "line 1: expected MODEL [OUTPUT], found 3 words"),
        (["a", "'b"], "line 2: No closing quotation"),
    ],
)
def test_lists_that_are_none(models: Path, lines: list[str], expected: str) -> None:
    ran = ders("compress", "--batch", write_list(models, *lines))
    assert ran.code == 2 and expected in ran.err


def test_usage(models: Path) -> None:
    neither, both = ders("compress"), ders("compress", models / "b", "--batch", models / "a", "--json")
    assert neither.code == 2 and "--batch" in neither.err
    assert both.code == 2 and "quotes" in both.json["error"]["message"]
    for wrong in (models / "a", models / "missing.txt", models / "a" / "model.safetensors"):
        ran = ders("compress", "--batch", wrong)
        assert ran.code == 2 and "expected a text file" in ran.err, wrong
    assert "no folder with a config.json" in ders("compress", "--batch", f"{models}/x*").err
    bad = ders("compress", "--batch", f"{models}/*", "--delta", "int99")
    assert bad.code == 2 and "1/3" not in bad.err  # before the first model


def test_outputs_in_one_place_are_refused_before_anything_runs(models: Path, tmp_path: Path) -> None:
    make(tmp_path / "other" / "a", 5)
    listed = write_list(models, f"{models}/b", f"{models}/a", f"{tmp_path}/other/a")
    ran = ders("compress", "--batch", listed, "-o", tmp_path / "small")
    assert ran.code == 2 and "the output of both" in ran.err and not (tmp_path / "small").exists()
    listed = write_list(models, f"{models}/a", f"{models}/a", f"{models}/b")
    assert "the output of both" in ders("compress", "--batch", listed).err
    listed = write_list(models, f"{models}/a {models}/../models/b", f"{models}/b")
    ran = ders("compress", "--batch", listed, "--overwrite")
    assert ran.code == 2 and "itself a model of this batch" in ran.err
    assert not (models / "a-ders-int4").exists() and not (models / "b-ders-int4").exists()


@pytest.mark.parametrize(
    "first, second, says",
    [
        ("{m}/a s3://b/B", "S3://b//B/ s3://b/out", "s3://b/B: the output of {m}/a, and itself a model"),
        ("{m}/a s3://b/x", "s3://b/x/deep s3://b/out", "and s3://b/x/deep of this batch stands in it"),
        ("{m}/a s3://b/x", "{m}/b S3://b/x/", "s3://b/x: the output of both {m}/a and {m}/b"),
        ("{m}/a {m}", "{m}/b {m}/out", "{m}: the output of {m}/a, and {m}/a of this batch stands in it"),
        ("{m}/a {m}/out", "{m}/b {m}/out/deep", "{m}/out/deep: the output of {m}/b, and {m}/out that of {m}/a"),
        ("{m}/a {m}/out/deep", "{m}/b {m}/out", "{m}/out: the output of {m}/b, and {m}/out/deep that of {m}/a"),
    ],
)
def test_outputs_over_models_and_each_other_are_refused(models: Path, first: str, second: str, says: str) -> None:
    listed = write_list(models, first.format(m=models), second.format(m=models))
    ran = ders("compress", "--batch", listed, "--overwrite")
    assert ran.code == 2 and says.format(m=models) in ran.err and not (models / "out").exists()


def _again(models: Path, *more: object) -> dict:
    """A batch of models/a alone, once more: its result."""
    return ders(
        "compress", "--batch", write_list(models, f"{models}/a out"), "-o", models.parent, "--json", *more
    ).json["batch"][0]


def test_another_recipe_is_not_skipped(models: Path) -> None:
    assert not _again(models)["skipped"] and _again(models)["skipped"]
    for more in (("--delta", "int3"), ("--seed", 1), ("--base", "expert:0")):
        refused = _again(models, *more)
        assert refused["exit_code"] == 2 and "another recipe" in refused["error"]["message"]
    assert not _again(models, "--seed", 1, "--overwrite")["skipped"]
    assert _again(models, "--seed", 1)["skipped"]


def test_another_model_is_not_skipped(models: Path) -> None:
    _again(models)
    os.utime(models / "a" / "model.safetensors")  # later than the output
    assert "is older than" in _again(models)["error"]["message"]
    # of the same names and shapes, and older: only the weights tell
    shutil.copy(models / "b" / "model.safetensors", models / "a" / "model.safetensors")
    os.utime(models / "a" / "model.safetensors", (1, 1))
    assert "another model" in _again(models)["error"]["message"]
    shutil.rmtree(models / "a")
    make(models / "a", 0, layers=1)
    for path in (models / "a").iterdir():
        os.utime(path, (1, 1))
    assert "another model" in _again(models)["error"]["message"]


@pytest.mark.parametrize("tensor", ["0.mlp.experts.0.gate", "1.mlp.experts.2.down"])
def test_the_first_and_the_last_expert_are_looked_at(models: Path, tensor: str) -> None:
    _again(models)
    path = models / "a" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[read_header(path).begins[f"model.layers.{tensor}_proj.weight"]] ^= 1
    path.write_bytes(data)
    os.utime(path, (1, 1))
    assert "another model" in _again(models)["error"]["message"]


def test_a_damaged_output_is_not_skipped(models: Path) -> None:
    _again(models)
    (models.parent / "out" / "model.safetensors").unlink()
    assert _again(models)["exit_code"] == 4


def test_what_is_no_output_of_ders_is_refused(models: Path) -> None:
    make(models.parent / "out", 9)
    kept = contents(models.parent / "out")
    assert "not empty" in _again(models)["error"]["message"] and contents(models.parent / "out") == kept


def test_an_unfinished_model_is_resumed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ("--max-shard-size", "600B")
    with monkeypatch.context() as patch:
        patch.setattr(
            convert, "copy_carried", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left", "out"))
        )
        patch.setattr(convert.Conversion, "totals", lambda self: {"output_bytes": 0})
        assert _again(models, *small)["error"]["message"].startswith("out: No space left; free some space")
    partial = models.parent / "out.partial"
    made = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(made) > 2
    other = _again(models, *small, "--seed", 3)
    assert other["exit_code"] == 2 and "another recipe" in other["error"]["message"]
    result = _again(models, *small)
    assert result["exit_code"] == 0 and not result["skipped"] and not partial.exists()
    assert {path.name: path.stat().st_ino for path in (models.parent / "out").glob("*.safetensors")} == made


def test_an_interrupt_stops_with_the_summary_so_far(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = convert.run

    def run(conversion: convert.Conversion) -> dict:
        if conversion.out.name.startswith("b"):
            raise Interrupted
        return real(conversion)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(convert, "run", run)
    monkeypatch.setattr(batch.os, "_exit", leave)
    ran = ders("compress", "--batch", f"{models}/*", "--json")
    assert ran.code == 130 and [each["exit_code"] for each in ran.json["batch"]] == [0, 130]
    ran = ders("compress", "--batch", f"{models}/*")
    assert "already done" in ran.out and "interrupted" in ran.out and "2/3" in ran.err
    with monkeypatch.context() as patch:  # Ctrl-C has ended the reader of our output, too
        patch.setattr(batch, "_report", lambda *given: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
        assert ders("compress", "--batch", f"{models}/*").code == 130
    monkeypatch.setattr(convert, "run", real)
    assert [each["skipped"] for each in done("compress", "--batch", f"{models}/*", "--json").json["batch"]] == [
        True,
        False,
        False,
    ]


def test_a_dry_run_writes_nothing(models: Path) -> None:
    before = sorted(models.rglob("*"))
    ran = done("compress", "--batch", f"{models}/*", "--dry-run", "--delta", "exact")
    assert ran.out.count("at most") == 3 and sorted(models.rglob("*")) == before
