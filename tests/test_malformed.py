"""Every lie of malformed.py gets one line, the right exit code and nothing else; bombs stay within the memory of honest files."""

import functools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import malformed
import pytest
import typer
from command import ROOT, ders, done

CASES = malformed.cases()
SMALL = [case for case in CASES if not case.bomb]  # bombs go off in a process of their own


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The originals; no case may change them. Typer's commands are made once, which is most of a small run's time."""
    root = tmp_path_factory.mktemp("malformed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        malformed.originals(root, done)
        before = _listing(root)
        yield root
        assert _listing(root) == before


def _listing(folder: Path) -> list[tuple]:
    """Everything below a folder, links as such, with sizes and times."""
    found = []
    for path in sorted(folder.rglob("*")):
        seen = path.lstat()
        found.append((str(path), seen.st_mode, *((seen.st_size, seen.st_mtime_ns) if not path.is_dir() else ())))
    return found


def _arguments(run: malformed.Run, root: Path, model: Path, out: Path) -> list[str]:
    places = {"m": model, "out": out, "plain": root / "plain", "dense": root / "dense"}
    return [part.format(**places) for part in run.command.split()]


@pytest.mark.parametrize("case", SMALL, ids=[case.id.encode("unicode_escape").decode() for case in SMALL])
def test_lies_are_answered(root: Path, tmp_path: Path, case: malformed.Case) -> None:
    model = malformed.copy_of(root, case, tmp_path / "case" / "m")
    before = _listing(tmp_path)
    for number, run in enumerate(case.runs):
        out = tmp_path / (f"out{number}" if "-o {out}" in run.command else "out0")
        ran = ders(*_arguments(run, root, model, out))
        message = ran.out if run.code == 3 else ran.err
        assert (ran.code, run.said in message) == (run.code, True), f"{run}: {ran}"
        if run.code not in (0, 3):
            assert ran.err.startswith("ders: ") and len(ran.err.splitlines()) == 1 and len(ran.err) < 2000, ran.err
            assert not out.exists()
        assert all(letter.isprintable() or letter == "\n" for letter in ran.err + ran.out), ascii(ran)
    assert [line for line in _listing(tmp_path) if not line[0].startswith(str(tmp_path / "out"))] == before


def test_there_are_enough_cases_and_each_is_its_own() -> None:
    assert len(CASES) >= 400
    assert not [name for name, times in Counter(case.id for case in CASES).items() if times > 1]
    assert min(Counter(case.kind for case in CASES).values()) >= 8
    for case in CASES:
        assert case.runs and (case.why or all(run.code for run in case.runs)), f"{case.id}: taken, and why?"


BOMBS = """
import os, resource, sys
from pathlib import Path
import malformed
from command import ders, done

root = Path(sys.argv[1])
malformed.originals(root, done)  # everything that a run takes is in memory now
status = Path("/proc/self/status").read_text()
idle = 1024 * int(status.partition("VmSize:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (idle + (1 << 30),) * 2)
for number, case in enumerate(case for case in malformed.cases() if case.bomb):
    model = malformed.copy_of(root, case, root / f"case{number}" / "m")
    for run in case.runs:
        places = {"m": model, "out": root / "out", "plain": root / "plain", "dense": root / "dense"}
        ran = ders(*(part.format(**places) for part in run.command.split()))
        assert ran.code == run.code and run.said in ran.err, (case.id, run, ran)
    print(case.id)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc says what an idle process takes")
def test_bombs_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    ran = subprocess.run(
        [sys.executable, "-c", BOMBS, tmp_path], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout.splitlines()) == sum(case.bomb for case in CASES) > 10


def test_the_same_without_a_lie(root: Path, tmp_path: Path) -> None:
    """The originals themselves pass what their cases run, so that it is the lie that is refused."""
    for number, (of, command) in enumerate(sorted({(case.of, run.command) for case in CASES for run in case.runs})):
        if command == malformed.VERIFY.replace("{m}", "{out}") or of == "adapter" and "--expert-from" not in command:
            continue
        model, out = root / of, tmp_path / str(number)
        done(*_arguments(malformed.Run(command), root, model, out))
        shutil.rmtree(out, ignore_errors=True)
