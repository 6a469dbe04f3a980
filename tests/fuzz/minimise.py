"""Keep the few small inputs of a corpus that reach what all of it reaches: python tests/fuzz/minimise.py TARGET FROM [FROM ...]

An input is worth keeping for the steps from line to line of ders (kernels as Python) that no smaller one takes. At most MOST files of
MOST_BYTES in all go to tests/fuzz/corpus/TARGET; files with names of words there are kept as they are.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).parent
MOST, MOST_BYTES, LARGEST = 40, 50_000, 8192
Step = tuple[CodeType, int, int]


def steps(run: Callable[[], Any]) -> set[Step]:
    """(code, line, next line) of everything in ders that `run` runs."""
    found: set[Step] = set()

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        if "/ders_" not in frame.f_code.co_filename:
            return None
        before = 0

        def moved(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            if event == "line":
                found.add((frame.f_code, before, frame.f_lineno))
                before = frame.f_lineno
            return moved

        return moved

    sys.settrace(entered)
    try:
        run()
    finally:
        sys.settrace(None)
    return found


def main(name: str, folders: list[Path]) -> None:
    from fuzz.targets import TARGETS, finds

    if TARGETS[name].kernels == "python":
        if os.environ.get("NUMBA_DISABLE_JIT") != "1":  # too late for this process
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"NUMBA_DISABLE_JIT": "1"})
        from fuzz import python_kernels

        python_kernels.install()
    kept = HERE / "corpus" / name
    kept.mkdir(parents=True, exist_ok=True)
    named = [path for path in kept.iterdir() if "-" in path.name]
    data = {path.read_bytes() for folder in [*folders, kept] for path in folder.iterdir() if path.is_file()}
    data = sorted((one for one in data if len(one) <= LARGEST), key=lambda one: (len(one), one))
    for one in data[:20]:  # what is run once only, such as an import, is no input's merit
        finds(TARGETS[name], one)
    reached = {one: steps(lambda one=one: finds(TARGETS[name], one)) for one in data}
    left, chosen = set().union(*reached.values()), []
    for path in named:
        left -= reached.get(path.read_bytes(), set())
    while left and len(chosen) + len(named) < MOST:
        best = max(data, key=lambda one: len(reached[one] & left) / (len(one) + 200))
        if sum(map(len, [*chosen, best])) > MOST_BYTES:
            break
        chosen.append(best)
        left -= reached[best]
    for path in kept.iterdir():
        if path not in named:
            path.unlink()
    for one in chosen:
        (kept / hashlib.sha256(one).hexdigest()[:12]).write_bytes(one)
    print(f"{name}: {len(data)} inputs -> {len(chosen)} and {len(named)} named, {len(left)} steps left out")


if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[1] / folder) for folder in (".", "kernels", "tests")]
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
