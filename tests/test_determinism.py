"""The same bytes whatever threads, blocks, order, process, folder, environment, interruptions and accidents of timing there are.

test_walk.py holds it for threads and blocks of real architectures, codec by codec; here one small model has a layer for every
codec and dtype, so that each way of running is tried for all of them, and for restore, sparsify, quantize and upcycle.
docs/measure/determinism.py repeats the test of timing for as long as you like.
"""

import json
import multiprocessing
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import handmade
import numpy as np
import pytest
from command import ROOT, contents, ders, done, whole
from independent_reader import narrow

from ders_cli import convert, users
from ders_cli.checkpoint import reader, writer
from ders_cli.errors import Interrupted
from ders_cli.output import Options
from ders_cli.recipe import load_recipe
from ders_cli.report import Progress
from ders_cli.source import open_source

CODECS = [
    "exact",
    "int4",
    "int1",
    "drop0.5",
    "ternary0.3",
    "top0.3",
    "2:4",
    "rank2",
    "sparse0.5",
    "none",
    "top0.3+int2",
]
CODECS += ["int1+rank2", "exact", "int2"]
DTYPES = ["BF16", "F32", "F16"]


def make_moe(folder: Path, layers: int = len(CODECS), files: int = 1) -> Path:
    """A model of small odd layers, each of another shape, number of experts and dtype, and something that is copied; in several
    files the tensors stand in another order."""
    random_, tensors = np.random.default_rng(0), {}
    for number in range(layers):
        shape = 3 + number % 11, 5 + number
        base, own = random_.standard_normal(shape), random_.standard_normal((2 + number % 3, *shape))
        dtype = DTYPES[number % len(DTYPES)]
        tensors |= handmade.layer(number, dtype, narrow((base + own / 50).astype(np.float32), dtype))
    tensors["model.embed_tokens.weight"] = "BF16", random_.integers(0, 2**15, (61, 7), np.uint16)
    names = sorted(tensors, key=lambda name: name[::-1]) if files > 1 else list(tensors)
    handmade.save(folder, {name: tensors[name] for name in names}, files=files)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_dense(folder: Path) -> Path:
    random_, tensors, hidden, inner = np.random.default_rng(1), {}, 8, 11
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for number in range(2):
        for name, shape in shapes.items():
            bits = narrow(random_.standard_normal(shape).astype(np.float32), "BF16")
            tensors[f"model.layers.{number}.mlp.{name}_proj.weight"] = "BF16", bits
        for name in ("q", "k", "v", "o"):
            tensors[f"model.layers.{number}.self_attn.{name}_proj.weight"] = "BF16", np.ones((8, 8), np.uint16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{number}.{name}.weight"] = "BF16", np.ones(8, np.uint16)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = "BF16", np.ones((61, 8), np.uint16)
    tensors["model.norm.weight"] = "BF16", np.ones(8, np.uint16)
    config = dict(model_type="llama", vocab_size=61, hidden_size=8, intermediate_size=11, num_hidden_layers=2)
    config |= dict(num_attention_heads=2, num_key_value_heads=2, hidden_act="silu", tie_word_embeddings=False)
    return handmade.save(folder, tensors, config)


def make_recipe(path: Path) -> Path:
    rules = [{"layers": number, "delta": codec, "group_size": 4} for number, codec in enumerate(CODECS)]
    path.write_text(json.dumps({"delta": "int4", "group_size": 4, "rules": rules}))
    return path


class Place:
    """Inputs, and the bytes that each command makes of them when nothing disturbs it."""

    def __init__(self, folder: Path):
        self.moe, self.dense = make_moe(folder / "moe"), make_dense(folder / "dense")
        self.recipe, self.packed = make_recipe(folder / "recipe.json"), folder / "packed"
        shards = ("--max-shard-size", "3kB")
        self.commands = {
            "compress": ("compress", self.moe, "--recipe", self.recipe, *shards),
            "restore": ("restore", self.packed),
            "sparsify": ("sparsify", self.moe, "--drop", 0.9, *shards),
            "quantize": ("quantize", self.moe, "--bits", 2, *shards),
            "upcycle": ("upcycle", self.dense, "--experts", 3, "--rank", 2, *shards),
            "upcycle full": ("upcycle", self.dense, "--experts", 3, "--full", "--noise", 0.1, *shards),
        }
        self.expected = {}
        for name, command in self.commands.items():
            out = self.packed if name == "compress" else folder / name
            done(*command, "-o", out, "-q", "-j", 1)
            self.expected[name] = contents(out)

    def check(self, name: str, out: Path, *flags: object) -> None:
        """One command, with its bytes."""
        done(*self.commands[name], "-o", out, "-q", *flags)
        assert contents(out) == self.expected[name], name
        shutil.rmtree(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = Place(tmp_path_factory.mktemp("determinism"))
    assert {name: len(files) > 4 for name, files in found.expected.items()} == dict.fromkeys(found.commands, True) | {
        "restore": False
    }
    return found


NAMES = ["compress", "restore", "sparsify", "quantize", "upcycle", "upcycle full"]
NAMED = pytest.mark.parametrize("name", NAMES)


# --- threads and blocks ---


@NAMED
def test_threads_and_blocks(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for jobs in (2, 3, 8):
        place.check(name, tmp_path / "out", "-j", jobs)
    for jobs, weights, mean_bytes in ((1, 1, 1), (3, 33, 333), (8, 1 << 30, 50)):
        for module in ("convert_group", "source"):
            monkeypatch.setattr(f"ders_cli.{module}.BLOCK_WEIGHTS", weights)
        monkeypatch.setattr("ders_cli.convert_group.MEAN_BYTES", mean_bytes)
        place.check(name, tmp_path / "out", "-j", jobs)


def test_a_decomposed_model_is_the_model(place: Place, tmp_path: Path) -> None:
    """sparsify and quantize of what decompose made, with any threads: the bytes of the plain one."""
    done("decompose", place.moe, "-o", tmp_path / "exact", "-q", "-j", 3)
    for name in ("sparsify", "quantize"):
        command = (place.commands[name][0], tmp_path / "exact", *place.commands[name][2:])
        done(*command, "-o", tmp_path / name, "-q", "-j", 5)
        assert contents(tmp_path / name) == place.expected[name]


@pytest.mark.parametrize("files", [2, 7])
def test_other_shards_of_the_source(place: Place, tmp_path: Path, files: int) -> None:
    """ders.json says how the source's files were; all else is the same, and restoring gives these files back."""
    source = make_moe(tmp_path / "source", files=files)
    done(place.commands["compress"][0], source, *place.commands["compress"][2:], "-o", tmp_path / "out", "-q", "-j", 2)
    found, expected = contents(tmp_path / "out"), dict(place.expected["compress"])
    ours, theirs = json.loads(found.pop("ders.json")), json.loads(expected.pop("ders.json"))
    assert found == expected
    assert ours["source"].pop("files") != theirs["source"].pop("files")
    assert ours["source"].pop("index") != theirs["source"].pop("index") and ours.pop("checksum") != theirs.pop(
        "checksum"
    )
    assert ours == theirs


# --- where and in what surroundings ---


SURROUNDINGS = {
    "other": dict(PYTHONHASHSEED="1", LC_ALL="C", PYTHONUTF8="0", TZ="Asia/Kathmandu", OMP_NUM_THREADS="7"),
    "random": dict(PYTHONHASHSEED="random", LC_ALL="tr_TR.UTF-8", TZ="America/St_Johns", NUMBA_NUM_THREADS="1"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(place: Place, tmp_path: Path, name: str) -> None:
    """A process of its own with another hash seed, locale, time zone and number of BLAS's threads."""
    _, _, *flags = place.commands["compress"]
    ran = whole("compress", place.moe, *flags, "-o", tmp_path / "out", "-q", **SURROUNDINGS[name])
    assert ran.returncode == 0, ran.stderr
    assert contents(tmp_path / "out") == place.expected["compress"]


def test_paths(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative, with dots, through a link to the folder, and from a cache whose files are links."""
    _, _, *flags = place.commands["compress"]
    (tmp_path / "link").symlink_to(place.moe, target_is_directory=True)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in place.moe.iterdir():
        shutil.copyfile(path, blobs / f"blob of {path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob of {path.name}")
    monkeypatch.chdir(place.moe.parent)
    for number, source in enumerate(("moe", "./dense/../moe/", tmp_path / "link", snapshot)):
        done("compress", source, *flags, "-o", tmp_path / f"{number}", "-q")
        assert contents(tmp_path / f"{number}") == place.expected["compress"], source


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_are_as_the_umask_says(place: Place, tmp_path: Path, mask: int) -> None:
    """Files as any program would make them, whatever the source's are: 666 but for the mask, the folder 777."""
    before = os.umask(mask)
    try:
        for name in ("compress", "restore"):
            out = tmp_path / name
            done(*place.commands[name], "-o", out, "-q")
            assert contents(out) == place.expected[name]
            assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o666 & ~mask}
            assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask
    finally:
        os.umask(before)


# --- orders, processes, interruptions ---


def backwards(job: Callable, count: int, folder: Path, threads: int, progress: Progress) -> list:
    """An engine that begins with the last shard."""
    return [job(number, progress) for number in reversed(range(count))][::-1]


def elsewhere(way: str, job: Callable, count: int, folder: Path, threads: int, progress: Progress) -> list:
    """An engine that runs shards in other processes, two at a time, the last ones first."""
    with ProcessPoolExecutor(2, multiprocessing.get_context(way)) as pool:
        futures = [pool.submit(job, number, Progress()) for number in reversed(range(count))]
        return [future.result() for future in reversed(futures)]


@NAMED
def test_backwards(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("ders_cli.engines.local.run_shards", backwards)
    place.check(name, tmp_path / "out", "-j", 2)


def test_in_other_processes(place: Place, tmp_path: Path) -> None:
    """What a job needs goes through pickle: an engine needs no cluster to be one."""
    with open_source(place.moe) as source:
        recipe = load_recipe(str(place.recipe), {})
        options = Options(2, 3000, run_shards=partial(elsewhere, "spawn"))
        convert.run(convert.prepare(source, recipe, tmp_path / "out", options))
    assert contents(tmp_path / "out") == place.expected["compress"]


@NAMED
def test_interrupted_again_and_again(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Stopped at some write, continued with other blocks, stopped again, and so on; to the end with other threads."""
    dice, left, real = random.Random(name), [0], writer.pwrite_all

    def stops(*given: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted
        real(*given)

    def exits(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(writer, "pwrite_all", stops)
    monkeypatch.setattr(os, "_exit", exits)
    out, stopped, times = tmp_path / "out", True, 0
    while stopped:
        left[0] = dice.choice((1, 2, 5, 30, 100)) if times < 12 else -1
        monkeypatch.setattr("ders_cli.convert_group.BLOCK_WEIGHTS", dice.choice((1, 50, 1 << 18)))
        jobs = 1 if times < 12 else 3  # only this thread can be stopped and be done with it
        ran = ders(*place.commands[name], "-o", out, "-q", "-j", jobs, *(["--resume"] if times else []))
        stopped = left[0] == 0
        assert ran.code == (130 if stopped else 0), ran.err
        times += stopped
    assert contents(out) == place.expected[name] and times


# --- timing ---


@contextmanager
def stressed() -> Iterator[Callable[[int], None]]:
    """Threads that change at every turn, and sleep where they read, write, hash and let go; each seed does it otherwise."""
    before, dice = sys.getswitchinterval(), random.Random()

    def disturbed(function: Callable) -> Callable:
        def run(*given: object, **named: object) -> object:
            if dice.random() < 0.2:
                time.sleep(dice.random() * 3e-4)
            return function(*given, **named)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, method in (
            (reader.CheckpointReader, "read_bytes"),
            (writer.ShardWriter, "write"),
            (writer.RunningHash, "update"),
            (users.Users, "done"),
        ):
            patch.setattr(owner, method, disturbed(getattr(owner, method)))
        sys.setswitchinterval(1e-6)
        try:
            yield dice.seed
        finally:
            sys.setswitchinterval(before)


@pytest.fixture
def stress() -> Iterator[Callable[[int], None]]:
    with stressed() as seed:
        yield seed


@NAMED
def test_timing(place: Place, tmp_path: Path, stress: Callable[[int], None], name: str) -> None:
    for seed in range(4):
        stress(seed)
        place.check(name, tmp_path / "out", "-j", 16)


def test_two_at_once(place: Place, tmp_path: Path, stress: Callable[[int], None]) -> None:
    """Two conversions in threads of one process, from one source that is open once."""
    recipe = load_recipe(str(place.recipe), {})
    for seed in range(2):
        stress(seed)
        outs = [tmp_path / f"{seed}{i}" for i in range(2)]
        with open_source(place.moe) as source, ThreadPoolExecutor(2) as pool:
            planned = [convert.prepare(source, recipe, out, Options(8, 3000)) for out in outs]
            list(pool.map(convert.run, planned))
        assert [contents(out) == place.expected["compress"] for out in outs] == [True, True]


def test_blas_keeps_one_thread_until_the_last_run_ends() -> None:
    """Its limit is the process's: the first of two runs to end must not lift it for the other, nor the second keep it."""
    code = """
import threading, numpy
from threadpoolctl import threadpool_info
from ders_cli.engines import local
def threads(): return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}
first, second, seen = threading.Event(), threading.Event(), []
def a(): first.set(); second.wait()
def b(): second.set(); other.join(); seen.append(threads())
other = threading.Thread(target=local.run, args=([a], 1))
before = threads()
other.start(); first.wait(); local.run([b], 1)
print(before, seen, threads())
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OPENBLAS_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.stdout.strip() == "{2} [{1}] {2}", ran
