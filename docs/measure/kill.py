"""Runs of `ders` killed at every call that changes a file, and at random instants: what stands there afterwards.

    python docs/measure/kill.py --kills 1000 --seed 0        markdown on stdout, losses with their commands on stderr
    python docs/measure/kill.py --only "restore"             one command; --every 5: every fifth call
    python docs/measure/kill.py --signals 200                SIGINT and SIGTERM, also from the process's first moment on
    python docs/measure/kill.py --resume-cost                bytes read again after a kill at 90 % of them

Toy models of a few kilobytes: it is the order of calls that is tried here, not their size. Exits with 1 if anything was lost.
What must hold is said in tests/killed.py. Needs a POSIX system and the test files beside it.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from faulty import Ended, Warm  # noqa: E402
from killed import BY_NAME, SCENES, Scene, Stage, cost_of_resuming  # noqa: E402

ENDS = ("absent", "old", "between", "resumed", "complete", "complete with remains")


class Table:
    """What became of kills, by command and part of the run."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], Counter[str]] = {}
        self.lost = 0

    def note(self, scene: Scene, how: str, phase: str, survived: str) -> None:
        self.counts.setdefault((scene.name, how, phase), Counter())[survived] += 1

    def lose(self, scene: Scene, how: str, phase: str, stage: Stage, fault: str, error: AssertionError) -> None:
        self.note(scene, how, phase, "lost")
        self.lost += 1
        print(f"LOST {scene.name}, {fault}, in {phase}: {str(error)[:900]}", file=sys.stderr, flush=True)

    def show(self) -> None:
        print(
            "| command | how | part of the run | instants | absent | old kept | old aside | resumed | complete | complete, with remains | lost |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for (name, how, phase), found in self.counts.items():
            ends = " | ".join(str(found[end]) for end in ENDS)
            others = sum(
                count for end, count in found.items() if end not in (*ENDS, "lost")
            )  # a batch's outputs differ
            mixed = f" (+{others} in several states)" if others else ""
            print(f"| {name} | {how} | {phase} | {found.total()} | {ends}{mixed} | {found['lost']} |")
        every = sum(self.counts.values(), Counter())
        print(f"\n{every.total()} instants, {every['lost']} lost.\n", flush=True)


def systematic(stage: Stage, scene: Scene, table: Table, every: int) -> None:
    """A kill before each change, and in the middle of each write."""
    phases = stage.undisturbed(scene)[1].report["phases"]
    for number in range(1, len(phases) + 1, every):
        for what in ("kill", "torn"):
            if what == "torn" and not phases[number - 1].endswith(WRITTEN):
                continue
            attempt(stage, scene, table, "each change", phases[number - 1], f"{what}:{number}")


WRITTEN = ("data", "header", "record", "journal", "mark", "lock", "file", "json", "index")


def attempt(stage: Stage, scene: Scene, table: Table, how: str, phase: str, fault: str) -> None:
    """One run with a fault, and what is left of it."""
    stage.set(scene)
    try:
        ended = stage.run(scene.arguments, fault)
        assert ended.code == -9, ended
        table.note(scene, how, phase, stage.check(scene))
    except AssertionError as error:
        table.lose(scene, how, phase, stage, fault, error)


def at_random(stage: Stage, scene: Scene, table: Table, count: int, dice: random.Random, jobs: int) -> None:
    """SIGKILL from outside, uniformly over the time that a run takes."""
    arguments = (*scene.arguments, "-j", str(jobs))
    seconds = min(timed(stage, scene, arguments) for _ in range(3))
    for _ in range(count):
        stage.set(scene)
        instant = dice.uniform(0, seconds)
        pid = stage.start(arguments)
        time.sleep(instant)
        os.kill(pid, signal.SIGKILL)
        ended = stage.warm.wait(pid)
        how = f"at random, -j {jobs}"
        try:
            assert ended.code in (0, -9), ended
            table.note(scene, how, "any", stage.check(scene))
        except AssertionError as error:
            table.lose(scene, how, "any", stage, f"after {instant:.4f} of {seconds:.4f} s", error)


def timed(stage: Stage, scene: Scene, arguments: tuple[str, ...]) -> float:
    stage.set(scene)
    begin = time.monotonic()
    assert stage.run(arguments).code == 0
    return time.monotonic() - begin


def interrupted(stage: Stage, scene: Scene, table: Table, count: int, dice: random.Random) -> None:
    """SIGINT and SIGTERM before changes and reads, once and at every later call too; then from outside with -j 4."""
    report = stage.undisturbed(scene)[1].report
    for number in range(count):
        name = ("SIGINT", "SIGTERM")[number % 2]
        reads = number % 4 >= 2
        at = dice.randint(1, report["reads" if reads else "changes"])
        phase = "reads" if reads else report["phases"][at - 1]
        again = ":on" if number % 8 >= 4 and not reads else ""
        fault = f"{'read-' * reads}signal:{name}:{at}{again}"
        stage.set(scene)
        how = f"{name}{', and again' if again else ''}"
        try:
            polite(stage.run(scene.arguments, fault), twice=bool(again))
            table.note(scene, how, phase, stage.check(scene))
        except AssertionError as error:
            table.lose(scene, how, phase, stage, fault, error)
    arguments = (*scene.arguments, "-j", "4")
    seconds = timed(stage, scene, arguments)
    for _ in range(count // 4):
        stage.set(scene)
        instant = dice.uniform(0, seconds)
        pid = stage.start(arguments)
        time.sleep(instant)
        os.kill(pid, signal.SIGTERM)
        try:
            polite(stage.warm.wait(pid))
            table.note(scene, "SIGTERM at random, -j 4", "any", stage.check(scene))
        except AssertionError as error:
            table.lose(scene, "SIGTERM at random, -j 4", "any", stage, f"after {instant:.4f} s", error)


def polite(ended: Ended, twice: bool = False) -> None:
    """It was done already, or says in one line that it was interrupted; to the second signal it says nothing."""
    assert ended.code in (0, 130), ended
    assert ended.code == 0 or (twice and not ended.err) or "interrupted" in ended.line, ended


def cold(stage: Stage, table: Table, count: int, dice: random.Random) -> None:
    """Signals to a process of its own, from its first moment on: Python's start and the imports are in it."""
    scene = BY_NAME["compress int4"]
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
    command = [sys.executable, "-m", "ders_cli", *stage.placed(scene.arguments)]

    def started() -> subprocess.Popen:
        stage.set(scene)
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, **both, text=True, env=os.environ | {"PYTHONPATH": paths})

    started().communicate()  # caches
    begin = time.monotonic()
    started().communicate()
    seconds = time.monotonic() - begin
    for number in range(count):
        name = ("SIGINT", "SIGTERM")[number % 2]
        instant = dice.uniform(0, seconds)
        process = started()
        time.sleep(instant)
        process.send_signal(signal.Signals[name])
        out, err = process.communicate()
        phase = f"{instant / seconds * 10 // 2 * 20:.0f} % of {seconds:.1f} s and on"
        try:
            # Python's own start, some 20 ms, and end answer by themselves
            if process.returncode != -signal.Signals[name] or "ders_cli" in err:
                polite(Ended(process.returncode, out, err, {}))
            else:
                phase = "Python's own start or end"
            table.note(scene, f"{name}, cold", phase, stage.check(scene))
        except AssertionError as error:
            table.lose(scene, f"{name}, cold", phase, stage, f"after {instant:.3f} s", error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="at random instants, beside those at each change")
    parser.add_argument("--signals", type=int, default=0)
    parser.add_argument("--resume-cost", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, help="of the systematic kills, take every so-manieth; 0: none")
    parser.add_argument("--only", help="commands whose name has this in it")
    parser.add_argument("--scratch", type=Path, help="folder for the toys; default: the system's temporary one")
    given = parser.parse_args()
    dice, table = random.Random(given.seed), Table()
    with tempfile.TemporaryDirectory(dir=given.scratch) as root, Warm() as warm:
        if given.resume_cost:
            print(
                "| command | bytes read, undisturbed | after a kill at 90 % and --resume | read again |\n|---|---|---|---|"
            )
            for name, whole, again in cost_of_resuming(Path(root), warm):
                print(f"| {name} | {whole:,} | {again:,} | {again / whole:.1%} |", flush=True)
            return
        stage = Stage(Path(root), warm)
        scenes = [scene for scene in SCENES if not given.only or given.only in scene.name]
        try:
            for scene in scenes:
                if given.signals:
                    interrupted(stage, scene, table, given.signals // len(scenes), dice)
                    continue
                if given.every:
                    systematic(stage, scene, table, given.every)
                for jobs in (1, 4):
                    at_random(stage, scene, table, given.kills // len(scenes) // 2, dice, jobs)
            if given.signals:
                cold(stage, table, given.signals // 4, dice)
        finally:
            table.show()
    sys.exit(1 if table.lost else 0)


if __name__ == "__main__":
    main()
