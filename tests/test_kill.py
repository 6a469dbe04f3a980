"""Killed at any instant, interrupted, or begun twice at once: nothing is lost. docs/measure/kill.py tries every instant."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import Warm
from killed import BY_NAME, OUT, SCENES, Scene, Stage, cost_of_resuming, files_of, read_state

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
INSTANTS = 6  # of each command, spread over its calls
PHASES = {  # of a conversion in several files
    "lock",
    "mark",
    "journal",
    "shard's data",
    "shard's header",
    "shard's fsync",
    "shard's rename",
    "record",
    "carried file",
    "config.json",
    "index",
    "ders.json",
    "publish",
    "last rename",
    "after the last rename",
}


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as warm:
        yield warm


@pytest.fixture(scope="module")
def stage(warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("killed"), warm)


@pytest.fixture(params=SCENES, ids=lambda scene: scene.name)
def scene(request: pytest.FixtureRequest) -> Scene:
    return request.param


def _killed(stage: Stage, scene: Scene, fault: str) -> str:
    stage.set(scene)
    ended = stage.run(scene.arguments, fault)
    assert ended.code == -signal.SIGKILL, (fault, ended)
    return stage.check(scene)


def test_every_part_of_a_run_has_calls(stage: Stage) -> None:
    """The numbers reach into all parts, and are the same in the next run."""
    scene = BY_NAME["compress int4"]
    report = stage.undisturbed(scene)[1].report
    assert set(report["phases"]) >= PHASES
    stage.set(scene)
    assert stage.run(scene.arguments).report == report


def test_killed(stage: Stage, scene: Scene) -> None:
    """Before a change, or in the middle of a write."""
    count, own = len(stage.undisturbed(scene)[1].report["phases"]), SCENES.index(scene)
    steps = [1 + (count - 1) * number // (INSTANTS - 1) for number in range(INSTANTS)]
    instants = [steps[0], *(at + own % 9 for at in steps[1:-1]), steps[-1]]  # others in each scene
    kinds = [("kill", "torn")[(own + number) % 2] for number in range(INSTANTS)]
    survived = [_killed(stage, scene, f"{kind}:{at}") for kind, at in zip(kinds, instants, strict=True)]
    assert survived[-1].startswith("complete") and len(set(survived)) > 1, survived


@pytest.mark.parametrize("name", ["compress --overwrite", "restore"])
def test_killed_while_the_output_gets_its_name(stage: Stage, name: str) -> None:
    scene = BY_NAME[name]
    phases = stage.undisturbed(scene)[1].report["phases"]
    last = phases.index("publish")
    survived = [_killed(stage, scene, f"kill:{at}") for at in range(last, len(phases) + 1)]
    before = {"resumed"} if name == "restore" else {"old", "between"}
    assert set(survived) == {*before, "complete with remains"}, survived


@pytest.mark.parametrize("name", ["compress exact", "restore"])
def test_killed_with_threads(stage: Stage, name: str) -> None:
    """The order of calls is another in each run: a number is an instant like any other."""
    scene = BY_NAME[name]
    count = stage.undisturbed(scene)[1].report["changes"]
    for at in range(count // 8, count, count // 4):
        stage.set(scene)
        assert stage.run((*scene.arguments, "-j", "4"), f"kill:{at}").code == -signal.SIGKILL
        stage.check(scene)


@pytest.mark.parametrize("fault", ["signal:SIGINT:{}", "read-signal:SIGTERM:{}", "signal:SIGTERM:{}:on"])
@pytest.mark.parametrize("name", ["compress int4", "restore"])
def test_interrupted(stage: Stage, name: str, fault: str) -> None:
    """One line and exit 130, resumable; with `on` the signal comes again and again."""
    scene = BY_NAME[name]
    report = stage.undisturbed(scene)[1].report
    count = report["reads" if fault.startswith("read") else "changes"]
    for at in range(2, count, count // 3):
        stage.set(scene)
        ended = stage.run(scene.arguments, fault.format(at))
        assert ended.code == 130, (at, ended)
        assert (fault.endswith("on") and not ended.err) or "interrupted" in ended.line
        stage.check(scene)


def test_resuming_reads_little_again(warm: Warm, tmp_path: Path) -> None:
    for name, whole, again in cost_of_resuming(tmp_path, warm):
        assert whole > 2_000_000 and again < 0.2 * whole, (name, whole, again)


# --- two at once ---


def test_a_second_run_is_refused(stage: Stage) -> None:
    """The first one is stopped in its middle; the second one names it, and changes nothing."""
    scene = BY_NAME["compress int4"]
    stage.set(scene)
    pid = stage.start(scene.arguments, f"signal:SIGSTOP:{stage.undisturbed(scene)[1].report['changes'] // 2}")
    _until_stopped(pid)
    before = read_state(stage.place)
    try:
        for more in ((), ("--resume",), ("--overwrite",), ("--overwrite", "--resume")):
            ended = stage.run((*scene.arguments, *more))
            assert ended.code == 2 and f"process {pid} " in ended.line and f"{OUT}.partial" in ended.line, (more, ended)
            assert read_state(stage.place) == before
    finally:
        os.kill(pid, signal.SIGCONT)
        first = stage.warm.wait(pid)
    assert first.code == 0
    assert files_of(stage.place) == stage.expected(scene)


def _until_stopped(pid: int) -> None:
    """The process is the warm one's child, not ours: only /proc tells."""
    state = ""
    while state != "T":
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state != "Z", "it ended before it was stopped"
        os.sched_yield()


def test_the_lock_of_a_killed_run_is_taken_without_a_word(stage: Stage) -> None:
    scene = BY_NAME["compress int4"]
    stage.set(scene)
    assert stage.run(scene.arguments, "kill:60").code == -signal.SIGKILL
    lock = stage.place / f"{OUT}.partial" / ".ders-lock"
    assert set(json.loads(lock.read_text())) == {"pid", "host", "since"}
    ended = stage.run((*scene.arguments, "--resume"))
    assert ended.code == 0 and ended.err == "" and files_of(stage.place) == stage.expected(scene)


@pytest.mark.parametrize(
    ("change", "said"), [("recipe", "recipe"), ("touched", "model-00002-of-00004.safetensors"), ("size", "shard size")]
)
def test_another_recipe_or_source_is_not_resumed(stage: Stage, change: str, said: str) -> None:
    scene = BY_NAME["compress int4"]
    stage.set(scene)
    assert stage.run(scene.arguments, "kill:60").code == -signal.SIGKILL
    before, arguments = read_state(stage.place), [*scene.arguments, "--resume"]
    file = stage.root / "moe" / "model-00002-of-00004.safetensors"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if change == "recipe":
        arguments[arguments.index("int4")] = "int8"
    elif change == "size":
        arguments += ["--max-shard-size", "1GB"]
    else:
        os.utime(file)
    ended = stage.run(tuple(arguments))
    os.utime(file, ns=times)
    assert ended.code == 2 and said in ended.line and "--overwrite" in ended.line, ended
    found = read_state(stage.place)[0]
    lock = f"{OUT}.partial/.ders-lock"  # says who had it last
    assert found.pop(lock) and before[0].pop(lock) and found == before[0]
    stage.check(scene)


def test_eight_at_once(stage: Stage, tmp_path: Path) -> None:
    """They wait at one gate; one works, or some one after another, and who is refused says so."""
    scene, gate = BY_NAME["compress int4"], tmp_path / "gate"
    os.mkfifo(gate)
    for _ in range(4):
        stage.set(scene)
        pids = [stage.start((*scene.arguments, "--overwrite", "--resume"), gate=str(gate)) for _ in range(8)]
        with gate.open("w"):
            ended = [stage.warm.wait(pid) for pid in pids]
        assert any(run.code == 0 for run in ended)
        for run in ended:
            assert run.code == 0 or (run.code == 2 and "another run" in run.line), run
        assert files_of(stage.place) == stage.expected(scene)
        assert stage.left_over(scene) == []
