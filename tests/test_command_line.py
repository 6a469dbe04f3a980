"""The command line's promises: exit codes, JSON, names, start-up."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
import toy
from command import ROOT, ders, done, whole

COMMANDS = [path.stem for path in (ROOT / "ders_cli" / "commands").glob("[a-z]*.py")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    toy.make("mixtral", folder, dtype=torch.bfloat16)
    return folder


def test_help_is_light() -> None:
    """No torch, numpy or numba; under 0.3 s on an idle core."""
    code = "import sys\nsys.argv = ['ders', '--help']\nfrom ders_cli.app import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'numpy', 'numba', 'pydantic', 'transformers') if m in sys.modules], file=sys.stderr)"
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert ran.stderr.strip() in ("[]", "['pydantic']"), ran.stderr
    assert min(seconds) < 2 * 0.3  # CPU seconds, not wall; twice, for a core that is shared


def test_every_command_is_there_with_examples() -> None:
    out = whole("--help").stdout
    for command in COMMANDS:
        assert command in out
        text = whole(command, "--help", COLUMNS="200").stdout
        assert f"ders {command}" in text or "ders " + command in text, command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ""),
        (("nonsense",), ""),
        (("compress",), ""),
        (("compress", "nowhere"), "no such folder"),
        (("compress", "{model}", "--delta", "int9"), "int9"),
        (("compress", "{model}", "--delta", "foo"), "no codec 'foo'"),
        (("compress", "{model}", "--base", "nowhere"), "no such folder"),
        (("compress", "{model}", "--base", "expert:7"), "experts 0 ... 2"),
        (("compress", "{model}", "--recipe", "nothing"), "no published recipe"),
        (("compress", "{model}", "--max-memory", "lots"), "--max-memory"),
        (("sparsify", "{model}", "--method", "2:4", "--drop", "0.5"), "--drop"),
        (("restore", "{model}"), "no ders.json"),
        (("verify", "{model}", "{model}", "--against", "{model}"), "two references"),
        (("verify", "{model}", "--max-error", "1"), "--against"),
        (("compress", "{model}", "-o", "{model}"), "stands there"),
    ],
)
def test_usage_is_2(model: Path, arguments: tuple[str, ...], said: str) -> None:
    ran = whole(*(argument.format(model=model) for argument in arguments))
    assert ran.returncode == 2, ran
    assert said in ran.stderr + ran.stdout and "Traceback" not in ran.stderr


def test_recipe_errors_are_exact(model: Path, tmp_path: Path) -> None:
    for text, said in {
        "delta: int4\nrules:\n  - detla: int8\n": "rules[0]: unknown key 'detla'; did you mean 'delta'?",
        "delta: int4\nbsae: mean\n": "unknown key 'bsae'; did you mean 'base'?",
        "delta: 4\n": "delta: input should be a valid string, found 4",
        "base: mean\n": "delta: field required",
        "delta: int4\nrules: [{delta: int3, layers: 1-x}]\n": "layers '1-x'",
        "delta: [int4\n": "not YAML",
        "just words\n": "expected keys and values",
        "a: &x [1]\ndelta: *x\n": "aliases",
    }.items():
        (tmp_path / "r.yaml").write_text(text)
        ran = ders("compress", model, "--recipe", tmp_path / "r.yaml")
        assert ran.code == 2 and said in ran.err, (text, ran.err)


def test_failure_is_1(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    ran = ders("compress", model, "-o", tmp_path / "out")
    assert ran.code == 1 and "needed" in ran.err and not (tmp_path / "out").exists()


def test_broken_or_unsupported_is_4(model: Path, tmp_path: Path) -> None:
    toy.dense(tmp_path / "dense")
    ran = ders("compress", tmp_path / "dense")
    assert ran.code == 4 and "dense" in ran.err
    (tmp_path / "empty").mkdir()
    assert ders("compress", tmp_path / "empty").code == 4
    (tmp_path / "empty" / "config.json").write_text("{}")
    ran = ders("verify", tmp_path / "empty")
    assert ran.code == 4 and "safetensors" in ran.err


def test_quantised_sources_are_refused_by_name(tmp_path: Path) -> None:
    toy.make("mixtral", tmp_path / "fp8")
    file = tmp_path / "fp8" / "model.safetensors"
    tensors = {n: t.to(torch.float8_e4m3fn) if ".experts." in n else t for n, t in toy.load_file(file).items()}
    toy.save_file(tensors, file)
    ran = ders("compress", tmp_path / "fp8")
    assert ran.code == 4 and "F8_E4M3" in ran.err and ".experts." in ran.err and "dequantise" in ran.err


def test_interrupt_is_130(model: Path, tmp_path: Path) -> None:
    """SIGINT and SIGTERM while a conversion runs: a sentence, 130, nothing under the final name."""
    big = tmp_path / "big"
    toy.make("mixtral", big, dtype=torch.bfloat16, hidden_size=1024, intermediate_size=2048, num_local_experts=8)
    for number in (signal.SIGINT, signal.SIGTERM):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
        command = [
            sys.executable,
            "-m",
            "ders_cli",
            "compress",
            str(big),
            "--delta",
            "int2+rank64",
            "-o",
            str(tmp_path / f"out{number}"),
        ]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        while not (tmp_path / f"out{number}.partial").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
        assert not (tmp_path / f"out{number}").exists()


def test_json_of_every_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = {
        "compress": ("compress", model, "-o", out),
        "decompose": ("decompose", model, "-o", tmp_path / "exact"),
        "quantize": ("quantize", tmp_path / "exact", "-o", tmp_path / "q"),
        "sparsify": ("sparsify", tmp_path / "exact", "-o", tmp_path / "s"),
        "restore": ("restore", out, "-o", tmp_path / "plain"),
        "verify": ("verify", out, "--against", model),
    }
    for command, arguments in runs.items():
        document = done(*arguments, "--json").json
        assert document["schema"] == 1 and document["command"] == command
    for command in ("compress", "decompose", "quantize", "sparsify"):
        document = done(command, model, "--dry-run", "--json").json
        assert document["schema"] == 1 and document["dry_run"] and document["plan"]["output_bytes"] > 0
    failed = ders("compress", tmp_path / "nowhere", "--json")
    assert failed.code == 2 and json.loads(failed.out) == {
        "schema": 1,
        "error": {"message": failed.err.removeprefix("ders: ").strip(), "exit_code": 2},
    }


def test_default_output_names(model: Path) -> None:
    for arguments, name in {
        ("compress", model): "tiny-ders-int4",
        ("compress", model, "--delta", "drop0.9+int4"): "tiny-ders-drop0.9+int4",
        ("compress", model, "--delta", "2:4"): "tiny-ders-2of4",
        ("decompose", model): "tiny-ders-exact",
        ("sparsify", model, "--drop", 0.95): "tiny-ders-drop0.95",
        ("sparsify", model, "--drop", 0.98, "--method", "ternary"): "tiny-ders-ternary0.02",
        ("quantize", model, "--bits", 2): "tiny-ders-int2",
        ("compress", model, "--recipe", "onebit"): "tiny-ders-onebit",
        ("restore", model.with_name("tiny-ders-int4")): "tiny-ders-int4-restored",
    }.items():
        ran = done(*arguments, "-q")
        assert (model.with_name(name) / "config.json").is_file() and str(model.with_name(name)) in ran.out


def test_lossy_checkpoints_are_not_converted_again(model: Path, tmp_path: Path) -> None:
    done("compress", model, "--delta", "int8", "-o", tmp_path / "int8", "-q")
    ran = ders("quantize", tmp_path / "int8", "-o", tmp_path / "x")
    assert ran.code == 2 and "lossy already" in ran.err


@pytest.fixture
def full() -> Iterator[IO[str]]:
    """Where every write fails: no space left on the device."""
    with open("/dev/full", "w") as file:
        yield file


def _unheard(stderr: IO[str], *arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("PYTHONUNBUFFERED", None)  # what cannot be written is kept, and tried again at exit
    command = [sys.executable, "-m", "ders_cli", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


def test_an_error_that_nobody_reads_keeps_its_exit_code(full: IO[str]) -> None:
    for more in ((), ("--debug",)):
        ran = _unheard(full, "verify", "/nosuch", "--json", *more)
        assert ran.returncode == 2 and json.loads(ran.stdout)["error"]["exit_code"] == 2


def test_a_warning_that_nobody_reads_stops_nothing(model: Path, tmp_path: Path, full: IO[str]) -> None:
    done("compress", model, "-o", tmp_path / "small", "-q")
    (tmp_path / "small" / "generation_config.json").write_text("{}")
    (tmp_path / "small" / "folder").mkdir()
    done("decompose", model, "-o", tmp_path / "exact", "-q")
    (tmp_path / "exact" / "generation_config.json").write_text("{}")
    (tmp_path / "exact" / "folder").mkdir()
    (tmp_path / "list").write_text(f"{tmp_path}/nowhere\n{model} {tmp_path}/listed\n")
    for number, arguments in enumerate(
        (
            ("restore", tmp_path / "small", "-o", tmp_path / "plain", "--json"),
            ("compress", tmp_path / "exact", "-o", tmp_path / "again", "--json"),
            ("compress", "--batch", tmp_path / "list", "--json"),
        )
    ):
        ran = _unheard(full, *arguments)
        assert ran.returncode == number // 2 and json.loads(ran.stdout)["command"] == arguments[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["app._interrupt", "__main__._end"])
def test_a_signal_ends_it_though_nobody_reads_why(where: str, number: int, full: IO[str]) -> None:
    """The second one, and one before or after the command."""
    module, function = where.split(".")
    code = f"import os, signal\nfrom ders_cli import {module}\nif {module!r} == 'app': app._interrupted.append(0)\n"
    code += f"signal.signal({int(number)}, {where})\nos.kill(os.getpid(), {int(number)})\nwhile True: pass"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    assert subprocess.run([sys.executable, "-c", code], stderr=full, env=environment, timeout=60).returncode == 130


def test_an_interrupt_that_nobody_reads_is_130(tmp_path: Path, full: IO[str]) -> None:
    code = "import sys\nfrom ders_cli import app\nfrom ders_cli.errors import Interrupted\n"
    code += "def interrupted(): raise Interrupted\napp.app = interrupted\nsys.argv = ['ders', '--json']\napp.main()"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True, env=environment)
    assert ran.returncode == 130 and json.loads(ran.stdout)["error"]["exit_code"] == 130


def test_lost_streams_under_optimisation() -> None:
    """python -O leaves out what stands in an assert."""
    ran = subprocess.run(
        ["sh", "-c", 'exec "$0" -O -m ders_cli --help <&-', sys.executable],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
    )
    assert ran.returncode == 0 and "compress" in ran.stdout and ran.stderr == "", ran


def test_quiet_off_terminal(model: Path, tmp_path: Path) -> None:
    ran = whole("compress", model, "-o", tmp_path / "out")
    assert ran.returncode == 0 and ran.stderr == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    ran = whole("compress", tmp_path / "nowhere", "--debug")
    assert ran.returncode == 2 and "Traceback" in ran.stderr and re.search(r"^ders: ", ran.stderr, re.M)


def test_overwrite_spares_inputs_and_strangers(model: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for out in (model, model / ".." / model.name, model.parent):
        ran = ders("compress", model, "-o", out, "--overwrite")
        assert ran.code == 2 and "input" in ran.err
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    ran = ders("compress", model, "-o", tmp_path / "letters", "--overwrite")
    assert ran.code == 2 and "has no config.json" in ran.err and (tmp_path / "letters" / "a.txt").exists()
    done("compress", model, "--delta", "int8", "-o", tmp_path / "out", "-q")
    done("compress", model, "--delta", "int2", "-o", tmp_path / "out", "-q", "--overwrite")
    assert "int2" in (tmp_path / "out" / "ders.json").read_text()


@pytest.mark.parametrize(
    ("dtype", "size", "flags"),
    [
        (torch.float16, 6e4, ("--delta", "rank4")),
        (torch.float16, 6e4, ("--delta", "ternary0.05", "--base", "expert:0")),
        (torch.bfloat16, 3e38, ("--delta", "int4", "--base", "expert:0")),
        (torch.bfloat16, 3e38, ("--delta", "int1")),
    ],
)
def test_values_past_the_range_are_named(
    tmp_path: Path, dtype: torch.dtype, size: float, flags: tuple[str, ...]
) -> None:
    """A sum that the dtype cannot hold is an error that says what to do; exact takes the same experts."""
    toy.make("mixtral", tmp_path / "wild", dtype=dtype)
    tensors, random = toy.load_file(tmp_path / "wild" / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in (name for name in tensors if ".experts." in name):
        tensors[name] = ((torch.rand(tensors[name].shape, generator=random) * 2 - 1) * size).to(dtype)
    toy.save_file(tensors, tmp_path / "wild" / "model.safetensors", metadata={"format": "pt"})
    ran = ders("compress", tmp_path / "wild", *flags, "-o", tmp_path / "out")
    assert ran.code == 4 and "range" in ran.err and "exact" in ran.err and ".experts." in ran.err, ran
    done("compress", tmp_path / "wild", "--delta", "exact", "-o", tmp_path / "exact", "-q")
    done("restore", tmp_path / "exact", "-o", tmp_path / "plain", "-q")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == (
        tmp_path / "wild" / "model.safetensors"
    ).read_bytes()


def test_experts_that_are_not_alike(tmp_path: Path) -> None:
    """Independent experts: a warning for lossy codecs and for exact; none for upcycled ones."""
    toy.make("mixtral", tmp_path / "native", dtype=torch.bfloat16, hidden_size=64, intermediate_size=128)
    tensors, random = toy.load_file(tmp_path / "native" / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in (name for name in tensors if ".experts." in name):
        tensors[name] = torch.randn(tensors[name].shape, generator=random).bfloat16()
    toy.save_file(tensors, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    for delta in ("int4", "exact"):
        ran = done("compress", tmp_path / "native", "--delta", delta, "-o", tmp_path / delta, "--json")
        assert "not alike" in ran.err and len(ran.json["warnings"]) == 1
    toy.make("mixtral", tmp_path / "upcycled", dtype=torch.bfloat16)
    ran = done("compress", tmp_path / "upcycled", "-o", tmp_path / "out", "--json")
    assert ran.err == "" and ran.json["warnings"] == []
