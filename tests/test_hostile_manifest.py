"""ders.json from a stranger, checksum and all: one line and exit 4, nothing written outside OUT, no false "all well"."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from command import contents, ders, done

from ders_cli.checkpoint.manifest import manifest_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    toy.make("mixtral", root / "source", dtype=torch.bfloat16)
    done("compress", root / "source", "--delta", "exact", "-o", root / "packed", "-q")
    return root / "packed"


def _remade(folder: Path, tmp_path: Path, change: Any) -> Path:
    broken = Path(shutil.copytree(folder, tmp_path / "deep" / "broken"))
    manifest = json.loads((broken / "ders.json").read_text())
    change(manifest)
    (broken / "ders.json").write_bytes(manifest_text(manifest))
    return broken


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\0.safetensors", "x" * 300, "x.bin", ".."]
)
def test_nothing_outside_the_output(folder: Path, tmp_path: Path, name: str) -> None:
    def change(manifest: dict) -> None:
        files = manifest["source"]["files"]
        files[name] = files.pop("model.safetensors")

    broken = _remade(folder, tmp_path, change)
    before = sorted(tmp_path.rglob("*"))
    for command in (["restore", broken, "-o", tmp_path / "deep" / "out", "--overwrite"], ["verify", broken]):
        ran = ders(*command)
        assert ran.code == 4 and len(ran.err.splitlines()) == 1, ran
    assert sorted(tmp_path.rglob("*")) == before


def _paths(node: Any, path: tuple = ()) -> list[tuple]:
    """A place of every kind in the manifest: of lists and of maps of names, the first entry."""
    found = [path] if path else []
    if isinstance(node, dict):
        few = (
            list(node)[:1]
            if path in (("tensors",), ("files",), ("source", "files"), ("source", "aliases"))
            else list(node)
        )
        for key in few:
            found += _paths(node[key], (*path, key))
    elif isinstance(node, list) and node:
        found += _paths(node[0], (*path, 0))
    return found


@pytest.mark.parametrize("value", ["missing", None, -1, 10**18, 1.5, "x", [], {}], ids=str)
def test_any_field_may_lie(folder: Path, tmp_path: Path, value: Any) -> None:
    """Every field in turn is replaced: no traceback (which would be raised here), no exit code but these."""
    text = (folder / "ders.json").read_text()
    whole = json.loads(text)
    broken = _remade(folder, tmp_path, lambda manifest: None)
    for path in _paths(whole):
        manifest = copy.deepcopy(whole)
        node = manifest
        for key in path[:-1]:
            node = node[key]
        if value == "missing":
            del node[path[-1]]
        else:
            node[path[-1]] = value
        (broken / "ders.json").write_bytes(manifest_text(manifest))
        assert ders("verify", broken).code in (0, 3, 4), path
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        assert ders("restore", broken, "-o", tmp_path / "out", "-j", 1).code in (0, 1, 4), path


def test_swapped_places_are_found(folder: Path, tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        a, b = manifest["groups"][0]["members"][:2]
        a["tensor"], b["tensor"] = b["tensor"], a["tensor"]

    ran = ders("verify", _remade(folder, tmp_path, change))
    assert ran.code == 3 and "expert 0: ders.json places it in" in ran.out and "expert 1: " in ran.out


def test_two_experts_in_one_place(folder: Path, tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        a, b = manifest["groups"][0]["members"][:2]
        a["tensor"] = b["tensor"]

    broken = _remade(folder, tmp_path, change)
    for command in (["verify", broken], ["restore", broken, "-o", tmp_path / "out"]):
        ran = ders(*command)
        assert ran.code == 4 and "experts.0.w2" in ran.err  # its own place is left empty
    assert not (tmp_path / "out").exists()


def test_partial_folders_of_others_are_spared(folder: Path, tmp_path: Path) -> None:
    model = folder.with_name("source")
    for name in ("input.partial", "other.partial"):
        shutil.copytree(model, tmp_path / name)
    before = contents(tmp_path / "other.partial")
    for command in (
        ["compress", tmp_path / "input.partial", "-o", tmp_path / "input"],
        ["compress", model, "-o", tmp_path / "other"],
    ):
        for flag in ("--overwrite", "--resume"):
            assert ders(*command, flag).code == 2
    assert contents(tmp_path / "other.partial") == contents(tmp_path / "input.partial") == before


def test_carried_files_of_any_name(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder.with_name("source"), tmp_path / "model"))
    for name in ("plan.json", "a.result.json", "b.spool", "é.txt"):
        (model / name).write_text(name)
    (model / "sub").mkdir()
    (model / "old.bin").write_bytes(b"0")
    plan = done("compress", model, "-o", tmp_path / "out", "--dry-run", "--json").json["plan"]
    ran = done("compress", model, "-o", tmp_path / "out")
    assert "not carried along: old.bin, sub/" in ran.err
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) == plan["output_bytes"]
    done("verify", tmp_path / "out", "-q")
    done("restore", tmp_path / "out", "-o", tmp_path / "plain", "-q")
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {p.name for p in model.iterdir()} - {
        "sub",
        "old.bin",
    }


def test_odd_outputs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder.with_name("source")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    done("compress", model, "-o", tmp_path / "link", "-q")
    done("verify", tmp_path / "real", "-q")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ders("compress", model, "-o", ".").code == 2
    (tmp_path / "x.partial").mkdir()
    for text in ("[]", "no json"):
        (tmp_path / "x.partial" / ".ders-plan.json").write_text(text)
        assert ders("compress", model, "-o", tmp_path / "x", "--resume").code == 2


def test_usage_errors_of_the_parser_have_a_document(folder: Path) -> None:
    ran = ders("compress", folder, "--jobs", 0, "--json")
    assert ran.code == 2 and ran.json["error"]["exit_code"] == 2
    assert ders("compress", folder.with_name("source"), "--delta", "").code == 2


def test_exact_bound_holds_for_the_smallest(tmp_path: Path) -> None:
    for number, sizes in enumerate(
        ({"hidden_size": 8, "intermediate_size": 1, "num_attention_heads": 1, "num_key_value_heads": 1},)
    ):
        toy.make("mixtral", tmp_path / f"m{number}", dtype=torch.bfloat16, **sizes)
        plan = done(
            "compress", tmp_path / f"m{number}", "--delta", "exact", "-o", tmp_path / "o", "--dry-run", "--json"
        ).json["plan"]
        done("compress", tmp_path / f"m{number}", "--delta", "exact", "-o", tmp_path / "o", "-q")
        assert sum(path.stat().st_size for path in (tmp_path / "o").iterdir()) <= plan["output_bytes"]
