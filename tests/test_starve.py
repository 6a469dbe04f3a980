"""Disks that are full, calls that fail, inputs that change, limits: one line that says where, and nothing that looks done.

docs/measure/starve.py fails every call in turn; here it is a few of each kind.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import ROOT, Warm
from killed import BY_NAME, COMPRESS, OUT, Stage, files_of, make_models, write_files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
NOBODY = 65534
ROOT_ONLY = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may become another")


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """In a folder that everybody may enter: some runs are another user's."""
    with tempfile.TemporaryDirectory(prefix="ders-starve-") as root, Warm() as warm:
        os.chmod(root, 0o755)
        yield Stage(Path(root), warm)


COMPRESSED = BY_NAME["compress int4"]


# --- calls that fail ---

FAULTS = {
    "full disk": ("errno:ENOSPC:{}:on", 5),
    "quota": ("errno:EDQUOT:{}", 13),
    "bad disk": ("errno:EIO:{}", 11),
    "stale reads": ("read-errno:ESTALE:{}:on", 29),
    "bad reads": ("read-errno:EIO:{}", 31),
    "too many files": ("read-errno:EMFILE:{}", 37),
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("name", ["compress exact, one shard", "restore", "compress --overwrite", "upcycle --full"])
def test_a_call_fails(stage: Stage, name: str, kind: str) -> None:
    """Exit 1 and a line with a path, or it didn't matter; then --resume gives the same bytes."""
    scene, (fault, steps) = BY_NAME[name], FAULTS[kind]
    report = stage.undisturbed(scene)[1].report
    count = report["reads" if fault.startswith("read") else "changes"]
    for at in range(2, count, -(-count // min(steps, 4))):
        stage.starve(scene, fault.format(at + steps % 7))


@pytest.mark.parametrize("name", ["compress int4", "restore"])
def test_calls_that_do_less_than_asked(stage: Stage, name: str) -> None:
    """Reads and positioned writes may do half of what was asked, as POSIX has it."""
    scene = BY_NAME[name]
    for fault in ("read-short:1:on", "short:1:on"):
        assert stage.starve(scene, fault, codes=()) == "exit 0, complete"


def test_the_line_says_what_to_do(stage: Stage) -> None:
    phases = stage.undisturbed(COMPRESSED)[1].report["phases"]
    stage.set(COMPRESSED)
    line = stage.run(COMPRESSED.arguments, f"errno:ENOSPC:{phases.index('config.json') + 1}:on").line
    assert all(word in line for word in ("config.json", "No space left", "free some space", "-o", "--resume")), line
    stage.check(COMPRESSED)


# --- a source that changes while it is read ---


@pytest.mark.parametrize("how", ["cut", "rewritten", "replaced", "touched", "removed"])
def test_a_source_changes(stage: Stage, how: str) -> None:
    """The run ends and names the file, or its bytes are those of the source as it was."""
    sources, times = (
        {name: data for name, data in stage.sources[0].items() if name.startswith("moe/")},
        stage.sources[1],
    )
    expected, report = stage.expected(COMPRESSED), stage.undisturbed(COMPRESSED)[1].report
    named = 0
    for at in range(1, report["reads"], report["reads"] // 12):
        stage.set(COMPRESSED)
        ended = stage.run(COMPRESSED.arguments, f"source:{how}:{at}")
        for other in (stage.root / "moe").glob("*.other"):
            other.unlink()
        write_files(stage.root, sources)
        for name in sources:
            os.utime(stage.root / name, ns=(times[name], times[name]))
        if ended.code == 0:
            assert files_of(stage.place) == expected, at
        else:
            assert ended.code in (1, 2, 4) and str(stage.root) in ended.line, (at, ended)
            assert not (stage.place / OUT).exists()
            named += "moe" in ended.line
    assert named >= 3
    shutil.rmtree(stage.place)
    stage.place.mkdir()


# --- places that cannot be written or read ---


def _as_nobody(stage: Stage, *arguments: str):
    return stage.run(arguments, user=NOBODY) if os.geteuid() == 0 else stage.run(arguments)


@pytest.fixture
def empty(stage: Stage) -> Iterator[Path]:
    shutil.rmtree(stage.place)
    stage.place.mkdir()
    yield stage.place
    stage.place.chmod(0o755)


def test_a_target_that_may_not_be_written(stage: Stage, empty: Path) -> None:
    empty.chmod(0o555)
    ended = _as_nobody(stage, *COMPRESSED.arguments)
    assert ended.code == 1 and f"{OUT}.partial: Permission denied" in ended.line, ended


def test_a_source_that_may_not_be_read(stage: Stage, empty: Path) -> None:
    file = stage.root / "moe" / "model-00003-of-00004.safetensors"
    mode = file.stat().st_mode
    file.chmod(0)
    empty.chmod(0o777)
    ended = _as_nobody(stage, *COMPRESSED.arguments)
    file.chmod(mode)
    assert ended.code == 1 and f"{file}: Permission denied" in ended.line, ended


def test_a_source_that_may_not_be_written(stage: Stage, empty: Path) -> None:
    folder = stage.root / "moe"
    folder.chmod(0o555)
    empty.chmod(0o777)
    ended = _as_nobody(stage, *COMPRESSED.arguments)
    folder.chmod(0o755)
    assert ended.code == 0, ended
    assert files_of(empty) == stage.expected(COMPRESSED)


def test_strange_targets(stage: Stage, empty: Path) -> None:
    """A parent that is missing is made; one that is a file, and a link to nowhere, are refused."""
    made = tuple(str(empty / "a" / "b" / OUT) if a == OUT else a for a in COMPRESSED.arguments)
    assert stage.run(made).code == 0
    assert files_of(empty / "a" / "b") == stage.expected(COMPRESSED)
    (empty / "file").write_text("")
    ended = stage.run(tuple(str(empty / "file" / OUT) if a == OUT else a for a in COMPRESSED.arguments))
    assert ended.code in (1, 2) and str(empty / "file") in ended.line, ended
    (empty / OUT).symlink_to(empty / "nowhere")
    ended = stage.run(COMPRESSED.arguments)
    assert (ended.code == 2 and str(empty) in ended.line) or files_of(empty / "nowhere"), ended


# --- limits ---


@pytest.mark.parametrize(("shards", "most", "works"), [(4, 9, False), (4, 11, False), (4, 20, True), (40, 64, True)])
def test_few_open_files(stage: Stage, empty: Path, tmp_path: Path, shards: int, most: int, works: bool) -> None:
    _check_few_files(stage, empty, tmp_path, shards, most, works)


@pytest.mark.parametrize("most", [12, 20, 32])
def test_fewer_open_files_than_shards(stage: Stage, empty: Path, tmp_path: Path, most: int) -> None:
    _check_few_files(stage, empty, tmp_path, 40, most, False)


def _check_few_files(stage: Stage, empty: Path, root: Path, shards: int, most: int, works: bool) -> None:
    """It works, or one line names the file that could not be opened and the limit."""
    make_models(root, layers=4, files=shards)
    ended = stage.run(tuple(str(root / "moe") if a == "../moe" else a for a in COMPRESS), limits={"NOFILE": most})
    assert (ended.code == 0) == works == (empty / OUT / "ders.json").exists(), ended
    named = str(root) in ended.err or str(empty) in ended.err
    assert works or (ended.code == 1 and named and "ulimit -n" in ended.line), ended


def test_small_files_only(stage: Stage, empty: Path) -> None:
    """RLIMIT_FSIZE: the shard is named, --max-shard-size told of."""
    ended = stage.run(COMPRESS + ("--delta", "int4"), limits={"FSIZE": 12_000})
    assert ended.code == 1 and "safetensors" in ended.line and "--max-shard-size" in ended.line, ended
    assert not (empty / OUT).exists()
    again = stage.run((*COMPRESS, "--delta", "int4", "--resume"))
    assert again.code == 0 and files_of(empty) == stage.expected(BY_NAME["compress int4, one shard"])


# --- a process of its own: streams, memory, caches ---


def _cold(stage: Stage, arguments: tuple[str, ...], shell: str = '"$@"', **environment: str):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "ders_cli", *stage.placed(arguments)]
    given = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(["sh", "-c", shell, "sh", *command], capture_output=True, text=True, env=given, timeout=120)


@pytest.mark.parametrize(
    ("shell", "code"), [('"$@" >&-', 0), ('"$@" 2>&-', 0), ('"$@" >&- 2>&- <&-', 0), ('"$@" >/dev/full', 1)]
)
def test_lost_streams(stage: Stage, empty: Path, shell: str, code: int) -> None:
    """What is written never goes into a file of the checkpoint, and a full stdout is said on stderr."""
    ran = _cold(stage, COMPRESSED.arguments, shell)
    assert ran.returncode == code and "Traceback" not in ran.stderr and "Exception" not in ran.stderr, ran
    assert (len(ran.stderr.splitlines()) == 1) == bool(code), ran.stderr
    assert files_of(empty) == stage.expected(COMPRESSED)


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS holds on Linux")
@pytest.mark.parametrize("megabytes", [150, 420])
def test_little_memory(stage: Stage, empty: Path, megabytes: int) -> None:
    """The same bytes, or exit 1 with one line: no traceback and no output."""
    ran = _cold(stage, COMPRESSED.arguments, f'ulimit -v {megabytes << 10}; "$@"', OPENBLAS_NUM_THREADS="1")
    if ran.returncode == 0:
        assert files_of(empty) == stage.expected(COMPRESSED)
        return
    assert ran.returncode == 1 and len(ran.stderr.splitlines()) == 1 and "memory" in ran.stderr, ran
    assert not (empty / OUT).exists()


def test_no_place_for_caches(stage: Stage, empty: Path) -> None:
    """Kernels are compiled anew where neither the home nor the temporary folder takes them."""
    ran = _cold(stage, COMPRESSED.arguments, HOME="/proc/1", XDG_CACHE_HOME="/proc/1/x")
    assert ran.returncode == 0 and files_of(empty) == stage.expected(COMPRESSED), ran
