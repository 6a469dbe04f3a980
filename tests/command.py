"""Running the real command, in this process for speed; `whole` runs it as a user does."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


def ders(*arguments: object) -> Ran:
    """`ders ARGUMENTS` in this process: exit code, stdout, stderr."""
    import contextlib
    import io

    from ders_cli import app

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["ders", *map(str, arguments)]
        try:
            app.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.argv = argv
    return Ran(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Ran:
    """`ders ARGUMENTS`, which must succeed."""
    ran = ders(*arguments)
    if ran.code:
        pytest.fail(f"ders {' '.join(map(str, arguments))}: exit {ran.code}\n{ran.out}\n{ran.err}")
    return ran


def whole(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """`python -m ders_cli ARGUMENTS` as a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "ders_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
