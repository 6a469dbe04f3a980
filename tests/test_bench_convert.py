"""`ders bench convert`: a twin that does the run's I/O and no less, computing without a disk, and figures that add up."""

import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy
from command import ROOT, contents, ders, done

from ders_cli import bench_convert, convert
from ders_cli.bench_convert import TINY, ConvertBench, Row, Times, _as_is, _computed, _restore, _verify
from ders_cli.bench_memory import Held
from ders_cli.bench_model import make_model
from ders_cli.bench_stages import STAGES
from ders_cli.bench_traffic import Counted, Operation, Twin, recorded, waits
from ders_cli.engines import local
from ders_cli.output import Options
from ders_cli.recipe import make_recipe
from ders_cli.source import open_source

COMMANDS = ["compress", "restore", "verify", "verify --against"]
LIBRARIES = 600_000  # bytes that threadpoolctl reads of /proc, at each start of threads


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "model"
    make_model(folder, 0, TINY)
    (folder / "tokenizer.json").write_bytes(b"{}" * 40_000)  # carried along
    return folder


def _compress(model: Path, delta: str, jobs: int, out: Path, opened=_as_is) -> dict:
    """Three shards, so that files are made and closed while others wait."""
    with opened(open_source(model)) as source:
        return convert.run(
            convert.prepare(source, make_recipe({"delta": delta}), out, Options(jobs, max_shard_bytes=400_000))
        )


def _works(model: Path, packed: Path, delta: str, jobs: int) -> dict:
    return {
        "compress": partial(_compress, model, delta, jobs),
        "restore": partial(_restore, packed, jobs),
        "verify": partial(_verify, [packed], jobs),
        "verify --against": partial(_verify, [packed, model], jobs),
    }


def _counted(call) -> Counted:
    before = Counted.now()
    call()
    return Counted.now().since(before)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("delta", ["int4", "exact", "rank4"])
def test_the_twin_does_the_runs_io(model, tmp_path, delta, jobs, monkeypatch):
    """As the kernel counts it; and the files that it leaves have the names and sizes of the run's."""
    monkeypatch.setattr(local, "_one_blas_thread", nullcontext)  # it reads /proc
    packed = tmp_path / "packed"
    _compress(model, delta, jobs, packed)
    for name, work in _works(model, packed, delta, jobs).items():
        run, twin = tmp_path / "run", tmp_path / "twin"
        with recorded(model, tmp_path) as operations:
            work(run, _as_is)
        sizes = {file: len(data) for file, data in contents(run).items()} if run.exists() else {}
        shutil.rmtree(run, ignore_errors=True)
        whole = _counted(lambda: work(run, _as_is))  # noqa: B023 (called at once)
        shutil.rmtree(run, ignore_errors=True)
        again = _counted(Twin(operations, run, twin).run)
        assert whole.written == again.written and (whole.written > 0) == ("verify" not in name), name
        assert abs(whole.read - again.read) < 1000, name  # counting reads a little itself
        assert sum(op.size for op in operations if op.kind == "read") == pytest.approx(again.read, abs=1000)
        found = {file: len(data) for file, data in contents(twin).items()} if twin.exists() else {}
        assert found == sizes and not run.exists(), name
        if sizes:
            shards = [file for file in sizes if file.endswith(".safetensors")]
            assert (len(shards) >= 3 if name == "compress" else len(shards) == 1) and "tokenizer.json" in sizes
        shutil.rmtree(twin, ignore_errors=True)


def test_every_call_that_changes_the_disk_is_done_again(model, tmp_path):
    """fsync and rename of each shard, its size set beforehand, the folder's own: as many in the twin as in the run."""
    with recorded(tmp_path, model) as operations:
        _compress(model, "exact", 2, tmp_path / "run")
    with recorded(tmp_path, model) as again:
        Twin(operations, tmp_path / "run", tmp_path / "twin").run()

    def counted(found: list[Operation], of: str) -> dict[str, int]:
        paths = {op.kind: 0 for op in operations}
        for op in found:
            paths[op.kind] += op.size if op.kind in ("truncate", "read", "write") else 1
            assert (of in op.path) or str(model) in op.path or op.path == str(tmp_path)
        return paths

    expected, found = counted(operations, "/run"), counted(again, "/twin")
    assert expected == found
    assert expected["fsync"] >= 3 + 1 and expected["truncate"] > 1e5 and {"rename", "unlink", "mkdir"} <= set(expected)


def _operations(*lines: str) -> list[Operation]:
    """Lines such as "1 write a 4096": thread 1 writes a MiB at byte 4096 of file a, opened as handle 0."""
    found = []
    for thread, kind, path, *at in (line.split() for line in lines):
        flags = os.O_RDWR | os.O_CREAT if kind == "open" else 0
        handle = {"/a": 0, "/b": 1}.get(path, -1)
        found.append(Operation(int(thread), kind, path, handle, int(at[0]) if at else 0, 1 << 20, flags))
    return found


def test_what_a_twin_waits_for():
    found = waits(
        _operations(
            "0 mkdir /",
            "0 open /a",  # 1
            "1 write /a 0",
            "2 write /a 4194304",  # beside the other, not after it
            "1 write /a 1048576",
            "2 write /a 5242880",  # 5: the last of 2
            "1 write /a 2097152",  # 6: the last of 1
            "3 open /b",  # 7: a thread that began when two were through
            "0 read /a 0",
            "0 fsync /a",
        ),
        0,
    )
    assert found == {2: [1], 3: [1], 7: [0, 1, 5, 6], 8: [2, 5, 6, 7]}
    # a pool that lives on: who reads back waits for those bytes, who changes the file for all before
    lives = _operations(
        "0 open /a", "1 write /a 0", "2 write /a 4194304", "3 read /a 512", "0 fsync /a", "1 write /a 8", "2 close /a"
    )
    ends = _operations("1 mkdir /x", "2 mkdir /y", "3 mkdir /z")
    found = waits(lives + ends, 0)
    assert found[3] == [0, 1] and found[4] == [1, 2, 3] and found[5] == [4] and found[6] == [3, 4, 5]


def test_a_twins_threads_wait(tmp_path, monkeypatch):
    """A slow write is waited for before its file is renamed, by another thread."""
    lines = _operations("0 open /a", "1 write /a 0", "0 close /a", "0 mkdir /c")
    order, main = [], threading.get_ident()
    lines = [Operation(main if op.thread == 0 else 1, *list(vars(op).values())[1:]) for op in lines]
    twin = Twin(lines, Path("/nowhere"), tmp_path)

    def slow(operation, descriptors, buffer):
        time.sleep(0.1 * (operation.kind == "write"))
        order.append(operation.kind)

    monkeypatch.setattr(twin, "_do", slow)
    twin.run()
    assert order == ["open", "write", "close", "mkdir"]


def test_a_twin_that_fails_says_so(model, tmp_path):
    packed = tmp_path / "packed"
    _compress(model, "int4", 3, packed)
    with recorded(packed) as operations:
        _verify([packed], 3, tmp_path, _as_is)
    shutil.rmtree(packed)
    with pytest.raises(FileNotFoundError):
        Twin(operations, tmp_path / "run", tmp_path / "twin").run()


@pytest.mark.parametrize("delta", ["int4", "exact"])
def test_computing_is_the_whole_without_the_disk(model, tmp_path, delta, monkeypatch):
    """The same experts, coded to the same bits; hardly a byte read, none kept."""
    monkeypatch.setattr(
        local, "_one_blas_thread", nullcontext
    )  # it reads /proc: the more, the more libraries are loaded
    packed, found = tmp_path / "packed", {}
    expected = _compress(model, delta, 2, packed)
    held = Held([model])

    def work(out, opened):
        found.update(_compress(model, delta, 2, out, opened))

    moved = _counted(lambda: _computed(work, tmp_path / "none", held))
    assert found["groups"] == expected["groups"]
    size, spool = sum(len(data) for data in contents(packed).values()), 600_000
    header = (
        8 * 3000 + 4 * 80_000
    )  # opened by Python's own files, like those that are carried: copied, hashed before and after
    assert moved.read < header + (size + spool) * (delta == "exact") and moved.written < 200_000
    left = [path.stat() for path in (tmp_path / "none").iterdir()]
    assert sum(stat.st_size for stat in left) > 0.6 * size and sum(stat.st_blocks for stat in left) * 512 < 200_000
    for name, other in _works(model, packed, delta, 2).items():  # damaged bytes would be found
        if name != "compress":
            moved = _counted(partial(_computed, other, tmp_path / name, Held([packed, model])))
            assert moved.written < 200_000 and moved.read < header, name


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "dbrx", "granitemoe"])
def test_lent_rows_are_the_files(kind, tmp_path):
    """In any layout: transposed and stacked matrices are read as ever, others where they lie."""
    toy.make(kind, tmp_path / "toy")
    held = Held([tmp_path / "toy"])
    with open_source(tmp_path / "toy") as plain, held.lend(open_source(tmp_path / "toy")) as lent:
        for group in plain.groups:
            rows = slice(3, min(29, group.shape[0]))
            for member in range(len(group.members)):
                assert np.array_equal(plain.read(group, member, rows), lent.read(group, member, rows))


def test_the_report(tmp_path):
    report = done(
        "bench", "convert", "--quick", "--delta", "int4", "--delta", "exact", "--json", "--scratch", tmp_path
    ).json
    assert (report["schema"], report["command"], report["quick"], report["rounds"]) == (1, "bench convert", True, 1)
    assert report["bytes"] == TINY.layer_bytes and report["model"] == "synthetic" and report["cold"] is False
    assert {"python", "numpy", "numba", "blake3"} <= set(report["versions"]) and " on " in report["disk"]
    assert report["start_up"]["wall_s"] > 0.05 and report["start_up"]["cpu_s"] > 0.05
    assert [(row["delta"], row["command"]) for row in report["rows"]] == [
        (delta, command) for delta in ("int4", "exact") for command in COMMANDS
    ]
    for row in report["rows"]:
        for part in ("whole", "twin", "compute"):
            times = row[part]
            assert min(times.values()) > 0 and set(times) == {"wall_s", "cpu_s", "gb_s", "cpu_s_per_gb"}
            assert times["gb_s"] == pytest.approx(row["bytes"] / times["wall_s"] / 1e9, rel=2e-3)
            assert times["cpu_s_per_gb"] == pytest.approx(times["cpu_s"] / row["bytes"] * 1e9, rel=2e-3)
        assert row["ratio"] == pytest.approx(row["twin"]["wall_s"] / row["whole"]["wall_s"], rel=2e-3)
        assert row["written"] == row["twin_written"] and 0 <= row["read"] - row["twin_read"] < LIBRARIES
        assert row["read_alone"] is row["write_alone"] is row["of_limit"] is None and row["missed"] == ""
        assert row["twin"]["cpu_s"] < row["whole"]["cpu_s"]
    for delta, stages in report["stages"].items():
        assert tuple(stages) == STAGES
        assert all((seconds > 0) == ((stage, delta) != ("sums", "exact")) for stage, seconds in stages.items())
    assert not list(tmp_path.iterdir())


def test_cold(model, tmp_path):
    """The disk's own rates, where something is read or written; and no page of the input is left."""
    if bench_convert.disk_of(tmp_path).startswith("tmpfs"):
        assert ders("bench", "convert", "--quick", "--cold", "--scratch", tmp_path).code == 2
        return
    report = done(
        "bench", "convert", model, "--quick", "--cold", "--delta", "int4", "--json", "--scratch", tmp_path
    ).json
    assert report["cold"] and report["model"] == str(model)
    for row in report["rows"]:
        assert (row["write_alone"] is None) == row["command"].startswith("verify")
        slower = max(row[way]["wall_s"] for way in ("read_alone", "write_alone") if row[way])
        assert row["of_limit"] == pytest.approx(slower / row["whole"]["wall_s"], rel=2e-3)
    assert "of limit" in done("bench", "convert", "--quick", "--cold", "--delta", "int4", "--scratch", tmp_path).out


def test_dropped_pages_come_from_the_disk(model):
    if bench_convert.disk_of(model).startswith("tmpfs"):
        pytest.skip("the temporary folder is memory (tmpfs): its pages have no disk to come from")

    def from_disk() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])

    size = (model / "model.safetensors").stat().st_size
    read = partial(bench_convert._read_through, [model])
    read()
    before = from_disk()
    read()
    assert from_disk() - before < size / 10
    bench_convert.drop_pages([model])
    read()
    assert from_disk() - before >= 0.9 * size


def test_rounds_turn_and_medians_count(model, tmp_path, monkeypatch):
    """whole twin compute, twin compute whole, compute whole twin: the n-th call takes n^2 seconds."""
    ran = []

    def timed(call, cpu=None):
        call()
        ran.append(call)
        return Times((len(ran) - 1) ** 2, 1.0 + len(ran))

    monkeypatch.setattr(bench_convert, "_timed", timed)
    with ConvertBench(model, ("int4",), 2, 3, 1, tmp_path, False, False) as bench:
        row = next(bench.rows("int4"))
    assert [times.wall_s for times in (row.whole, row.twin, row.compute)] == [25, 9, 16]  # 0 5 7, 1 3 8, 2 4 6
    assert row.ratio == 9 / 25 and len(ran) == 9 and row.of_limit is None


def test_a_twin_that_misses_something_is_noted():
    whole, twin = Times(2, 2), Times(1, 1)
    row = Row(
        "restore", "int4", 10**9, whole, twin, None, 5 * 10**8, 10**9, 4 * 10**8, 10**9, Times(0.5, 1), Times(1.5, 1)
    )
    assert "restore, int4: the twin has 400,000,000 of 500,000,000 bytes read" == row.missed and row.of_limit == 0.75
    assert Row("restore", "int4", 10**9, whole, twin, None, 5 * 10**8, 10**9, 499 * 10**6, 10**9).missed == ""


def test_too_large_for_memory(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_convert.Held, "fits", staticmethod(lambda folders: False))
    report = done("bench", "convert", model, "--quick", "--delta", "int4", "--scratch", tmp_path, "--json").json
    assert [row["compute"] for row in report["rows"]] == [None] * 4
    assert " - " in done("bench", "convert", model, "--quick", "--delta", "int4", "--scratch", tmp_path).out


def test_usage(model, tmp_path):
    packed = tmp_path / "packed"
    _compress(model, "int4", 2, packed)
    for arguments in (
        (packed, "--quick"),
        ("--quick", "--scratch", tmp_path / "nowhere"),
        ("--quick", "--delta", "int99", "--scratch", tmp_path),
        (tmp_path / "nowhere",),
    ):
        ran = ders("bench", "convert", *arguments)
        assert ran.code == 2 and ran.err.startswith("ders: "), arguments
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]  # nothing is left of what was begun


def test_no_room(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_convert.shutil, "disk_usage", lambda folder: SimpleNamespace(free=9_400_000))
    ran = ders("bench", "convert", model, "--quick", "--scratch", tmp_path)  # three times 3.15 MB
    assert ran.code == 1 and "9.44 MB needed, 9.40 MB free" in ran.err and not list(tmp_path.iterdir())


def test_needs_no_torch(tmp_path):
    code = (
        "import sys\nsys.argv = ['ders', 'bench', 'convert', '--quick', '--delta', 'int4', '--scratch', sys.argv[1]]\n"
    )
    code += "from ders_cli.app import main\ntry: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and "start-up" in ran.stdout, ran.stderr


def test_the_synthetic_model(tmp_path):
    """The same bytes each time, of the size asked for, with deltas like a real model's."""
    assert make_model(tmp_path / "a", 0.007, TINY) == make_model(tmp_path / "b", 0.007, TINY) == 2
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with open_source(tmp_path / "a") as source:
        groups = source.groups
        assert sum(len(g.members) * g.shape[0] * g.shape[1] * 2 for g in groups) == 2 * TINY.layer_bytes
        experts = [source.read(groups[0], i, slice(0, 512)).astype(np.int32) for i in range(4)]
        assert 0.4 < (experts[0] == experts[1]).mean() < 0.6  # neither moved: 0.68^2
        assert not any((a == b).all() for a in experts for b in experts if a is not b)
        assert max(abs(a - b).max() for a in experts for b in experts) <= 48
