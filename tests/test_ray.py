"""The Ray engine on two nodes of one machine: the local engine's bytes, whatever dies meanwhile; and nothing stays behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import toy
from command import ROOT, contents, ders, done, whole

from ders_cli import convert
from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.checkpoint.writer import ShardWriter
from ders_cli.engines import find_engine
from ders_cli.engines import ray as engine
from ders_cli.errors import UsageError
from ders_cli.report import Progress

SHARDS = ("--max-shard-size", "20kB", "-q")  # the toy in some eight files


class Nodes:
    """A Ray head that offers no CPU, and two nodes of one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address, self._nodes = self._cluster.address, []
        self.complete()

    def complete(self) -> None:
        """Two nodes, where there may be fewer."""
        while len(self._nodes) < 2:
            self._nodes.append(self._cluster.add_node(num_cpus=1, wait=False))
        self._cluster.wait_for_nodes()

    def kill(self, node_id: str) -> None:
        """End a node's processes with SIGKILL."""
        node = next(node for node in self._nodes if node.node_id == node_id)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def stop(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    before = {key: os.environ.get(key) for key in ("PYTHONPATH", "RAY_ADDRESS")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    os.environ.pop("RAY_ADDRESS", None)
    cluster = Nodes()
    yield cluster
    cluster.stop()
    for key, value in before.items():
        os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


@pytest.fixture
def cluster(nodes: Nodes) -> tuple[str, ...]:
    """The flags that bring a command to the two nodes."""
    nodes.complete()
    return ("--engine", "ray", "--address", nodes.address)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "source"
    toy.make("qwen3_moe", folder, dtype=torch.bfloat16)
    return folder


def wrapped(at: Path, before: Callable[[Path, int, str], Progress | None]) -> Callable[..., Any]:
    """A `_shard` for the workers: `before(folder, shard's number, node id)` comes first, and may give the progress.

    What is defined in a function is pickled by value, so the workers run it as it is patched in here.
    """

    def shard(conversion: Any, folder: Path, run: str, number: int, progress: Progress) -> Any:
        import ray

        from ders_cli.convert import _shard

        given = before(at, number, ray.get_runtime_context().get_node_id())
        return _shard(conversion, folder, run, number, given or progress)

    return shard


def stalling() -> type[Progress]:
    """A Progress that never comes back from its first call: a shard is half written, and its worker alive."""
    from ders_cli.report import Progress

    class Stalls(Progress):
        def __init__(self, flag: Path):
            self._flag = flag

        def advance(self, count: int) -> None:
            import os
            import time

            written = self._flag.with_suffix(".new")
            written.write_text(str(os.getpid()))
            written.rename(self._flag)
            time.sleep(600)

    return Stalls


def when(flags: Path, pattern: str, act: Callable[[Path], None]) -> threading.Thread:
    """Call act(file) once, as soon as a file of this pattern is there."""

    def watch() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if found := list(flags.glob(pattern)):
                return act(found[0])
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("delta", ["int4", "exact"])
def test_same_bytes_from_two_nodes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, cluster, delta: str
) -> None:
    done("compress", source, "--delta", delta, "-o", tmp_path / "local", *SHARDS)
    (tmp_path / "flags").mkdir()

    def note(flags: Path, number: int, node: str) -> None:
        import time

        (flags / f"{number}-{node}").touch()
        time.sleep(0.3)  # long enough for the other node to come to its turn

    monkeypatch.setattr(convert, "_shard", wrapped(tmp_path / "flags", note))
    ran = done("compress", source, "--delta", delta, "-o", tmp_path / "ray", *SHARDS, *cluster)
    monkeypatch.undo()
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    noted = [path.name.split("-") for path in (tmp_path / "flags").iterdir()]
    assert sorted(int(number) for number, _ in noted) == list(range(len(noted))) and len(noted) > 5
    assert len({node for _, node in noted}) == 2
    assert capfd.readouterr() == ("", "") and ran.err == ""  # Ray's own words stay away
    done("restore", tmp_path / "ray", "-o", tmp_path / "plain", "-q", *cluster)
    done("restore", tmp_path / "local", "-o", tmp_path / "plain-local", "-q")
    assert contents(tmp_path / "plain") == contents(tmp_path / "plain-local")


def test_restore_of_many_files(source: Path, tmp_path: Path, cluster) -> None:
    """The source's own shards come back, each by a job; relative paths mean on a worker what they mean here."""
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for path in source.iterdir():
        (sharded / path.name).write_bytes(path.read_bytes())
    toy.reshard(sharded, 4)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        done("decompose", "sharded", "-o", "exact", *SHARDS, *cluster)
        done("restore", "exact", "-o", "again", "-q", *cluster)
    finally:
        os.chdir(here)
    assert contents(tmp_path / "again") == contents(sharded)


@pytest.mark.parametrize("form", [("--experts", "2", "--full"), ("--experts", "2", "--sparse", "0.9")])
def test_upcycle(tmp_path: Path, cluster, form: tuple[str, ...]) -> None:
    toy.dense(tmp_path / "dense")
    done("upcycle", tmp_path / "dense", *form, "-o", tmp_path / "local", *SHARDS)
    done("upcycle", tmp_path / "dense", *form, "-o", tmp_path / "ray", *SHARDS, *cluster)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_a_shard_whose_workers_always_die(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster
) -> None:
    """RETRIES + 1 attempts, then a sentence; --resume takes what is done."""

    def die(flags: Path, number: int, node: str) -> None:
        import os
        import signal
        import uuid

        if number == 1:
            (flags / f"{uuid.uuid4()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    (tmp_path / "flags").mkdir()
    monkeypatch.setattr(convert, "_shard", wrapped(tmp_path / "flags", die))
    monkeypatch.setattr(engine, "RETRIES", 1)
    command = ("compress", source, "-o", tmp_path / "ray", *SHARDS)
    ran = ders(*command, *cluster)
    monkeypatch.undo()
    assert ran.code == 1 and "output shard 2 of" in ran.err and "died 2 times" in ran.err, ran.err
    assert len(list((tmp_path / "flags").iterdir())) == 2
    done(*command, "--resume")
    done("compress", source, "-o", tmp_path / "local", *SHARDS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_errors_are_the_workers_own(source: Path, tmp_path: Path, cluster) -> None:
    """Same message, same exit code; no output; one document for --json."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = toy.load_file(broken / "model.safetensors")
    name = next(name for name in sorted(tensors) if "layers.1.mlp.experts.2.up" in name)
    tensors[name][3, 5] = float("nan")
    toy.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    local = ders("compress", broken, "-o", tmp_path / "local", *SHARDS)
    far = ders("compress", broken, "-o", tmp_path / "far", *SHARDS, "--json", *cluster)
    assert local.code == far.code == 4 and local.err == far.err and name in far.err, far
    assert json.loads(far.out)["error"]["exit_code"] == 4
    assert not (tmp_path / "far").exists() and (tmp_path / "far.partial").is_dir()


def test_faults_of_ders_keep_their_traceback(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster
) -> None:
    def fail(flags: Path, number: int, node: str) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(convert, "_shard", wrapped(tmp_path, fail))
    with pytest.raises(ZeroDivisionError, match="a fault"):
        ders("compress", source, "-o", tmp_path / "out", *SHARDS, *cluster)


def test_another_version_at_the_node(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster) -> None:
    monkeypatch.setattr(engine, "__version__", "7.7.7")
    ran = ders("compress", source, "-o", tmp_path / "out", *SHARDS, *cluster)
    assert ran.code == 2 and "has ders-cli" in ran.err and "every node needs ders-cli 7.7.7" in ran.err


def test_a_node_that_sees_other_storage(source: Path, tmp_path: Path) -> None:
    """Another disk's folder of the same name; a source that is not there."""
    assert engine._look("node a", tmp_path, 0) is None
    with pytest.raises(UsageError, match=r"node a: .*out\.partial: is not the driver's folder here; every node needs"):
        engine._look("node a", tmp_path / "out.partial" / ".ders-0.sign", 0)

    class Gone:
        def __reduce__(self):
            return open, (str(tmp_path / "model.safetensors"),)

    job = type("Ray", (), {"cloudpickle": ray.cloudpickle, "get": staticmethod(lambda given: given)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", job)
        with pytest.raises(UsageError, match=r"node b: .*model\.safetensors: No such file or directory; every node"):
            engine._opened("node b", [ray.cloudpickle.dumps(Gone())], str(tmp_path / "nowhere"))


def test_two_attempts_at_one_file(tmp_path: Path) -> None:
    """The earlier one, taken for dead, goes on: it ends with an error, and its bytes never stand in the later one's file."""
    path, spec = tmp_path / "model.safetensors", {"x": TensorSpec((4,), "U8")}
    import numpy as np

    first, other = ShardWriter(path, spec), ShardWriter(tmp_path / "a-model.safetensors", spec)
    first.write("x", 0, np.full(2, 1, np.uint8))
    first.spool(0).write_bytes(b"first")
    second = ShardWriter(path, spec)
    second.write("x", 0, np.full(2, 2, np.uint8))
    first.write("x", 2, np.full(2, 1, np.uint8))
    assert not first.spool(0).exists() and second.spool(0) != first.spool(0)
    with pytest.raises(FileNotFoundError):
        first.close()
    assert not path.exists()
    second.write("x", 2, np.full(2, 2, np.uint8))
    second.close()
    other.write("x", 0, np.full(4, 3, np.uint8))
    other.close()  # its file was left alone
    assert path.read_bytes()[-4:] == bytes([2] * 4)
    assert sorted(tmp_path.iterdir()) == [other.path, path]


def test_progress_comes_from_all_nodes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes, cluster
) -> None:
    class Looks(Progress):
        drawn, bytes = True, 0

        def advance(self, count: int) -> None:
            self.bytes += count

    def job(number: int, progress: Progress) -> int:
        import time

        for _ in range(3):
            progress.advance(100)
            time.sleep(0.4)
        return number

    looks = Looks()
    run = find_engine("ray", nodes.address, 2, False)
    assert run(job, 4, tmp_path, 1, looks) == [0, 1, 2, 3]
    assert looks.bytes in range(600, 1201, 100)  # the last words may come when nobody looks any more
    assert list(tmp_path.iterdir()) == []  # no sign is left


def test_more_threads_than_any_node_has(source: Path, tmp_path: Path, cluster) -> None:
    """Asked for, it is refused: it would wait for ever. By default it is what the nodes have."""
    ran = ders("compress", source, "-o", tmp_path / "out", *SHARDS, "-j", 64, *cluster)
    assert ran.code == 2 and "--jobs 64" in ran.err and "offers 1" in ran.err
    done("compress", source, "-o", tmp_path / "out", *SHARDS, "--overwrite", *cluster)


@pytest.mark.parametrize("dies", ["worker", "node"])
def test_shards_of_the_dead_run_again(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    nodes,
    cluster,
    dies: str,
) -> None:
    """The first job stops in the middle of its shard, and its worker or whole node is killed there."""
    flags = tmp_path / "flags"
    flags.mkdir()
    Stalls = stalling()

    def stall(flags: Path, number: int, node: str) -> Progress | None:
        try:
            (flags / "first").touch(exist_ok=False)
        except FileExistsError:
            return None
        return Stalls(flags / f"{node}.stalled")

    def kill(flag: Path) -> None:
        assert list((tmp_path / "ray.partial").glob("*.safetensors.*.partial")), "no shard is half written"
        nodes.kill(flag.stem) if dies == "node" else os.kill(int(flag.read_text()), signal.SIGKILL)
        (flags / "killed").touch()

    monkeypatch.setattr(convert, "_shard", wrapped(flags, stall))
    thread = when(flags, "*.stalled", kill)
    done("compress", source, "--delta", "exact", "-o", tmp_path / "ray", *SHARDS, *cluster)
    thread.join()
    monkeypatch.undo()
    assert (flags / "killed").exists()
    done("compress", source, "--delta", "exact", "-o", tmp_path / "local", *SHARDS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--engine", "spark"), "expected local or ray"),
        (("--address", "auto"), "goes with --engine ray"),
        (("--engine", "ray", "--address", "ray://head:10001"), "ray job submit"),
    ],
)
def test_usage(source: Path, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    ran = ders("compress", source, "-o", tmp_path / "out", *flags)
    assert ran.code == 2 and said in ran.err and not (tmp_path / "out.partial").exists()


def test_no_ray_installed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = ders("compress", source, "-o", tmp_path / "out", "--engine", "ray")
    assert ran.code == 2 and "pip install 'ders-cli[ray]'" in ran.err
    assert not (tmp_path / "out.partial").exists()


def _left_of(mark: str) -> list[str]:
    """Command lines of the processes with a mark in their environment, once they have had time to end."""
    until, found = time.monotonic() + 15, ["?"]
    while found and time.monotonic() < until:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and f"MARK={mark}".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:  # gone meanwhile
                continue
        time.sleep(0.1)
    return [line for line in found if line]  # a zombie has none


def test_one_line_starts_a_ray_of_its_own(source: Path, tmp_path: Path) -> None:
    mark = str(tmp_path)
    ran = whole("compress", source, "-o", tmp_path / "ray", *SHARDS, "--engine", "ray", "--json", MARK=mark)
    assert ran.returncode == 0 and ran.stderr == "", ran
    assert json.loads(ran.stdout)["command"] == "compress"
    done("compress", source, "-o", tmp_path / "local", *SHARDS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert _left_of(mark) == []


@pytest.mark.parametrize(
    ("number", "at"), [(signal.SIGINT, "shard"), (signal.SIGTERM, "shard"), (signal.SIGTERM, "start")]
)
def test_interrupt(tmp_path: Path, number: int, at: str) -> None:
    """The whole foreground group gets it, as from a terminal: a sentence, 130, and no process stays."""
    big, out, mark = tmp_path / "big", tmp_path / "out", str(tmp_path)
    sizes = dict(hidden_size=512, intermediate_size=1024, num_local_experts=8)
    toy.make("mixtral", big, dtype=torch.bfloat16, **sizes)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "MARK": mark}
    command = ["compress", big, "--delta", "int2+rank256", "-o", out, "--engine", "ray", "--max-shard-size", "2MB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ders_cli", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    awaited = "*.safetensors.*.partial" if at == "shard" else ".ders-*.sign"
    until = time.monotonic() + 120
    while not list(out.with_name("out.partial").glob(awaited)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)  # somewhere in Ray's start, or in a shard
    os.killpg(process.pid, number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert not out.exists() and _left_of(mark) == []
