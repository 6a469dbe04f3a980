"""The walk: same bytes whatever the threads, blocks and source shards; the plan's bytes are the bytes written."""

import json
from pathlib import Path

import pytest
import torch
import toy
from command import contents, ders, done

DELTAS = ["exact", "int4", "int1", "drop0.9", "ternary0.05", "top0.1", "2:4", "rank2", "drop0.9+int4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk") / "source"
    toy.make("qwen3_moe", folder, dtype=torch.bfloat16)
    return folder


@pytest.mark.parametrize("delta", DELTAS)
def test_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delta: str) -> None:
    def run(name: str, model: Path, *flags: object) -> dict[str, bytes]:
        done("compress", model, "--delta", delta, "-o", tmp_path / name, "-q", "--max-shard-size", "40kB", *flags)
        return contents(tmp_path / name)

    first = run("j1", source, "-j", 1)
    assert run("j2", source, "-j", 2) == first
    assert run("j7", source, "-j", 7) == first
    for weights in (40, 97, 1 << 30):
        monkeypatch.setattr("ders_cli.convert_group.BLOCK_WEIGHTS", weights)
        assert run(f"blocks{weights}", source, "-j", 2) == first
    monkeypatch.setattr("ders_cli.convert_group.MEAN_BYTES", 500)  # the mean in steps, experts read one by one
    assert run("steps", source, "-j", 2) == first
    monkeypatch.undo()
    resharded = tmp_path / "resharded"
    resharded.mkdir()
    for path in source.iterdir():
        (resharded / path.name).write_bytes(path.read_bytes())
    toy.reshard(resharded, 4)
    other = run("resharded-out", resharded)
    assert {n: b for n, b in other.items() if n != "ders.json"} == {n: b for n, b in first.items() if n != "ders.json"}
    assert len(first) > 5  # several shards


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("shard", ["5GB", "30kB"])
def test_plan_states_the_bytes(source: Path, tmp_path: Path, delta: str, shard: str) -> None:
    flags = ("--delta", delta, "--max-shard-size", shard)
    plan = done("compress", source, *flags, "-o", tmp_path / "out", "--dry-run", "--json").json["plan"]
    assert not (tmp_path / "out").exists()
    done("compress", source, *flags, "-o", tmp_path / "out", "-q")
    written = sum(len(data) for data in contents(tmp_path / "out").values())
    assert plan["exact"] == (delta != "exact")
    assert written == plan["output_bytes"] if plan["exact"] else written <= plan["output_bytes"]
    again = done("restore", tmp_path / "out", "-o", tmp_path / "plain", "--dry-run", "--json").json["plan"]
    done("restore", tmp_path / "out", "-o", tmp_path / "plain", "-q")
    assert sum(len(data) for data in contents(tmp_path / "plain").values()) == again["output_bytes"]


def test_seed_decides(source: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1), ("c", 1)):
        done("compress", source, "--delta", "drop0.5", "--seed", seed, "-o", tmp_path / name, "-q")
    a, b, c = (contents(tmp_path / name)["model.safetensors"] for name in "abc")
    assert a != b and b == c


def test_resume_gives_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop after the second shard; --resume takes the finished ones as they are and ends at the same bytes."""
    from ders_cli import convert
    from ders_cli.errors import Interrupted

    flags = ("--delta", "exact", "--max-shard-size", "30kB", "-q")
    done("compress", source, *flags, "-o", tmp_path / "whole")
    real, calls = convert._shard, []

    def stops(conversion, folder, run, number, progress):
        calls.append(conversion.plan.shards[number].file)
        if len(calls) == 3:
            raise Interrupted
        return real(conversion, folder, run, number, progress)

    monkeypatch.setattr(convert, "_shard", stops)
    monkeypatch.setattr("os._exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    assert ders("compress", source, *flags, "-o", tmp_path / "out").code == 130
    monkeypatch.undo()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
    refused = ders("compress", source, *flags, "-o", tmp_path / "out")
    assert refused.code == 2 and "--resume" in refused.err
    other = ders(
        "compress", source, "--delta", "int4", "--max-shard-size", "30kB", "-q", "-o", tmp_path / "out", "--resume"
    )
    assert other.code == 2 and "another recipe" in other.err
    kept = (tmp_path / "out.partial" / calls[0]).stat().st_mtime_ns
    done("compress", source, *flags, "-o", tmp_path / "out", "--resume")
    assert (tmp_path / "out" / calls[0]).stat().st_mtime_ns == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_recipe_and_flags_agree(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: expert:1\ndelta: drop0.5+int4\ngroup_size: 32\nseed: 7\n")
    done("compress", source, "--recipe", recipe, "-o", tmp_path / "a", "-q")
    flags = ("--base", "expert:1", "--delta", "drop0.5+int4", "--group-size", 32, "--seed", 7)
    done("compress", source, *flags, "-o", tmp_path / "b", "-q")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_rules_choose_codecs(source: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "delta: int1\nrules:\n  - {layers: 0, projections: [down], delta: exact}\n  - {layers: 1-9, delta: int8, group_size: 16}\n"
    )
    done("compress", source, "--recipe", recipe, "-o", tmp_path / "out", "-q")
    groups = json.loads((tmp_path / "out" / "ders.json").read_text())["groups"]
    codec = {(g["layer"], g["projection"]): g["codec"] for g in groups}
    assert codec[0, "down"] == {"codec": "exact"}
    assert codec[0, "up"] == {"codec": "int", "bits": 1, "group_size": 128}
    assert codec[1, "down"] == codec[2, "gate"] == {"codec": "int", "bits": 8, "group_size": 16}
    done("verify", tmp_path / "out", "--against", source, "-q")
    done("restore", tmp_path / "out", "-o", tmp_path / "plain", "-q")


def test_stock_loading_raises(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that does not know the format stops; it does not return random experts."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "ders", raising=False)  # test_hf.py imports the plug-in
    done("compress", source, "--delta", "int4", "-o", tmp_path / "out", "-q")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_memory_bound_lowers_the_threads(source: Path, tmp_path: Path) -> None:
    few = done("compress", source, "-j", 8, "--max-memory", "120MB", "-o", tmp_path / "a", "--dry-run", "--json").json[
        "plan"
    ]
    assert few["peak_memory_bytes"] <= 120_000_000
    refused = ders("compress", source, "--max-memory", "1MB", "-o", tmp_path / "a")
    assert refused.code == 2 and "--max-memory" in refused.err


def test_what_an_unfinished_run_has_taken_is_free(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk with room for one output, a run that was killed can be continued, or begun again."""
    import shutil
    from types import SimpleNamespace

    flags = ("--delta", "int4", "-q", "-o", tmp_path / "out")
    done("compress", source, *flags)
    taken = sum(path.stat().st_blocks * 512 for path in (tmp_path / "out").iterdir())
    (tmp_path / "out").rename(tmp_path / "out.partial")
    (tmp_path / "out.partial" / "ders.json").rename(tmp_path / "out.partial" / ".ders-plan.json")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    begun = ders("compress", source, *flags, "--overwrite")
    assert begun.code == 0, begun.err
    shutil.rmtree(tmp_path / "out")
    full = ders("compress", source, *flags)
    assert full.code == 1 and "1.00 kB free" in full.err and taken > 1000


def test_another_dense_model_is_another_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume looks at the base's files too: they could have changed under the same name."""
    from ders_cli.base import DenseBase
    from ders_cli.convert import fingerprint
    from ders_cli.output import Options
    from ders_cli.recipe import make_recipe
    from ders_cli.remote.reader import open_reader
    from ders_cli.source import open_source

    toy.dense(tmp_path / "dense", dtype=torch.bfloat16)
    marks = []
    for changed in (False, False, True):
        if changed:
            weights = tmp_path / "dense" / "model.safetensors"
            weights.write_bytes(weights.read_bytes())
        with open_source(source) as opened, open_reader(tmp_path / "dense") as reader:
            marks.append(fingerprint(opened, make_recipe({"delta": "int4"}), Options(), DenseBase(reader)))
    assert marks[0] == marks[1] != marks[2]
