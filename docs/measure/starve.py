"""`ders` on full disks, with failing calls and with little memory: what it says, and what stands there afterwards.

    python docs/measure/starve.py --calls                every call fails once: ENOSPC, EIO on changes; EIO, ESTALE on reads
    python docs/measure/starve.py --disk                 a tmpfs of 40 sizes, full at other instants each (root, or unshare -rm)
    python docs/measure/starve.py --address-space        RLIMIT_AS from the bare interpreter up
    python docs/measure/starve.py --max-memory SCRATCH   resident memory above idle, of a model of 1.1 GB

Markdown on stdout, what went wrong on stderr; exits with 1 then. What must hold is said in tests/killed.py.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from faulty import Warm  # noqa: E402
from killed import BY_NAME, OUT, SCENES, Stage, files_of  # noqa: E402

FAULTS = (
    "errno:ENOSPC:{}",
    "errno:ENOSPC:{}:on",
    "errno:EDQUOT:{}:on",
    "errno:EIO:{}",
    "errno:EROFS:{}:on",
    "read-errno:EIO:{}",
    "read-errno:ESTALE:{}:on",
    "read-errno:EMFILE:{}",
)
ON_DISK = ("compress int4", "compress exact", "restore", "upcycle --full", "compress --batch")
wrong = 0


def went_wrong(what: str, error: object) -> None:
    global wrong
    wrong += 1
    print(f"WRONG {what}: {str(error)[:700]}", file=sys.stderr, flush=True)


def calls(stage: Stage, every: int, only: str) -> None:
    print("| command | fault | calls | how runs ended |\n|---|---|---|---|")
    for scene in [scene for scene in SCENES if only in scene.name]:
        report = stage.undisturbed(scene)[1].report
        for fault in FAULTS:
            ends: Counter[str] = Counter()
            for number in range(1, report["reads" if fault.startswith("read") else "changes"] + 1, every):
                try:
                    ends[stage.starve(scene, fault.format(number))] += 1
                except AssertionError as error:
                    ends["wrong"] += 1
                    went_wrong(f"{scene.name}, {fault.format(number)}", error)
            said = "; ".join(f"{end}: {count}" for end, count in ends.most_common())
            print(f"| {scene.name} | {fault.format('N')} | {ends.total()} | {said} |", flush=True)


def disks(stage: Stage) -> None:
    """The place is a tmpfs that is too small; then it grows, and the run goes on."""
    print("| command | sizes | refused at once | full in the middle | enough |\n|---|---|---|---|---|")
    for scene in [BY_NAME[name] for name in ON_DISK]:
        expected = stage.expected(scene)
        whole, ends = sum(map(len, expected.values())) + 4096 * (len(expected) + 2), Counter()
        pages = whole // 4096 * 2
        for size in range(1, pages, max(1, pages // 40)):
            stage.set(scene)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={4 * size}k", "none", stage.place], check=True)
            try:
                ends[_on_disk(stage, scene, expected)] += 1
            except AssertionError as error:
                went_wrong(f"{scene.name} on {4 * size} kB", error)
            finally:
                subprocess.run(["umount", stage.place], check=True)
        print(f"| {scene.name} | {ends.total()} | {ends['refused']} | {ends['full']} | {ends['enough']} |", flush=True)


def _on_disk(stage: Stage, scene, expected: dict[str, bytes]) -> str:
    ended = stage.run(scene.arguments)
    if ended.code == 0:
        assert files_of(stage.place) == expected
        return "enough"
    assert ended.code == 1 and "Traceback" not in ended.err, ended
    assert scene.batch or (str(stage.place) in ended.line and ("free" in ended.line)), ended.err
    for name in scene.outputs:
        done = {file: data for file, data in files_of(stage.place).items() if file.startswith(f"{name}/")}
        assert not done or all(expected[file] == data for file, data in done.items()), f"{name} looks done"
    begun = any(stage.place.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=100m", stage.place], check=True)
    again = stage.run(scene.arguments if scene.batch else (*scene.arguments, "--resume"))
    assert again.code == 0 and files_of(stage.place) == expected, again
    return "full" if begun else "refused"


def address_space(stage: Stage) -> None:
    print("| RLIMIT_AS | -j 1 | -j 4 |\n|---|---|---|")
    scene = BY_NAME["compress int4"]
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
    for megabytes in (40, 80, 120, 160, 200, 240, 280, 320, 360, 400, 440, 480, 560, 640, 800, 1200):
        cells = []
        for jobs in ("1", "4"):
            stage.set(scene)
            command = [sys.executable, "-m", "ders_cli", *stage.placed((*scene.arguments, "-j", jobs))]
            given = os.environ | {"PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1"}
            limited = ["sh", "-c", f'ulimit -v {megabytes << 10}; exec "$@"', "sh", *command]
            ran = subprocess.run(limited, capture_output=True, text=True, env=given, timeout=300)
            lines = ran.stderr.splitlines()
            said = lines[-1][:90] if lines else ""
            cells.append(f"exit {ran.returncode}, {len(lines)} lines: {said}" if ran.returncode else "done")
            try:
                if ran.returncode == 0:
                    assert files_of(stage.place) == stage.expected(scene), "other bytes"
                    continue
                assert not (stage.place / OUT).exists(), "half an output"
                assert ran.returncode == 1 and len(lines) == 1, (ran.returncode, ran.stderr[-600:])
            except AssertionError as error:
                went_wrong(f"{megabytes} MB, -j {jobs}", error)
        print(f"| {megabytes} MB | {' | '.join(cells)} |", flush=True)


def max_memory(scratch: Path) -> None:
    """Resident memory, sampled every 5 ms, of conversions that were told how much they may take."""
    from ders_cli.bench_model import make_model

    model, out = scratch / "model", scratch / "packed"
    make_model(model, 1.1)
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))

    def peak(*arguments: str) -> tuple[int, float, str]:
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "ders_cli", "compress", str(model), "-o", str(out), "-q", *arguments]
        both = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **both, text=True, env=os.environ | {"PYTHONPATH": paths})
        most = 0
        while process.poll() is None:
            found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            most = max(most, int(found[1]) if found else 0)
            time.sleep(0.005)
        return process.returncode, most * 1024 / 1e6, process.stderr.read().strip()

    _, idle, _ = peak("--dry-run")
    print(f"Idle: {idle:.0f} MB.\n\n| --delta | --max-memory | -j | above idle | |\n|---|---|---|---|---|")
    for delta in ("int4", "exact"):
        for asked in (50, 100, 200, 500):
            for jobs in ("1", "2", "4"):
                code, most, said = peak("--delta", delta, "--max-memory", f"{asked}MB", "-j", jobs)
                print(f"| {delta} | {asked} MB | {jobs} | {most - idle:.0f} MB | {said or 'done'} |", flush=True)
                if code not in (0, 2) or (code == 0 and most - idle > asked):
                    went_wrong(f"{delta}, --max-memory {asked}MB -j {jobs}", f"{most - idle:.0f} MB, exit {code}")
    shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--address-space", action="store_true")
    parser.add_argument("--max-memory", type=Path, metavar="SCRATCH")
    parser.add_argument("--every", type=int, default=1, help="of the calls, take every so-manieth")
    parser.add_argument("--only", default="", help="commands whose name has this in it")
    parser.add_argument("--scratch", type=Path, help="folder for the toys; default: the system's temporary one")
    given = parser.parse_args()
    if given.max_memory:
        given.max_memory.mkdir()
        max_memory(given.max_memory)
    if given.calls or given.disk or given.address_space:
        with tempfile.TemporaryDirectory(dir=given.scratch) as root, Warm() as warm:
            stage = Stage(Path(root), warm)
            if given.calls:
                calls(stage, given.every, given.only)
            if given.disk:
                disks(stage)
            if given.address_space:
                address_space(stage)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
