"""The compiled functions' cache: processes that compile different signatures of one function don't mix them up."""

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from ders_kernels import jit

FUNCTION = textwrap.dedent(
    """
    import sys
    import numpy as np
    {source}

    @njit(cache=True)
    def total(x):
        return x.sum()

    if __name__ == "__main__":
        print(total(np.ones(3, sys.argv[1])))
    """
)
# One process has read the index, empty as it is, and another saves its code before the first one does.
LATE = """
from numba.core import caching
plain = caching.IndexDataCacheFile._load_index
def empty(self):
    plain(self)
    return {}
caching.IndexDataCacheFile._load_index = empty
"""


def _files(folder: Path, source: str, extra: str = "") -> Path:
    path = folder / "summed.py"
    path.write_text(FUNCTION.format(source=source + extra))
    return path


def _names(folder: Path, source: str, monkeypatch) -> set[str]:
    folder.mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder / "cache"))
    path = _files(folder, source, LATE)
    for dtype in ("float32", "int64"):
        done = subprocess.run([sys.executable, path, dtype], capture_output=True, text=True)
        assert done.stdout.strip() in ("3.0", "3"), done.stderr
    return {file.name for file in (folder / "cache").rglob("*.nbc")}


def test_two_at_once_write_two_files(tmp_path: Path, monkeypatch) -> None:
    """The race is there in numba's own names, and gone in ours."""
    assert len(_names(tmp_path / "theirs", "from numba import njit", monkeypatch)) == 1
    assert len(_names(tmp_path / "ours", "from ders_kernels.jit import njit", monkeypatch)) == 2


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    path = _files(tmp_path, "from ders_kernels.jit import njit")
    for _ in range(2):
        assert subprocess.run([sys.executable, path, "int64"], capture_output=True, text=True).stdout == "3\n"
    assert len(list((tmp_path / "cache").rglob("*.nbc"))) == 1


def test_a_full_disk_is_no_reason_to_stop(tmp_path: Path, monkeypatch) -> None:
    """numba's own cache raises what the disk does."""
    full = "\nimport errno, os\ndef full(*names): raise OSError(errno.ENOSPC, 'full')\nos.replace = full"
    for source, said in (("numba", "OSError"), ("ders_kernels.jit", "")):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / source))
        path = _files(tmp_path, f"from {source} import njit", full)
        ran = subprocess.run([sys.executable, path, "int64"], capture_output=True, text=True)
        assert (ran.stdout == "3\n") == (said == "") and said in ran.stderr, ran


def test_every_kernel_is_compiled_through_it() -> None:
    root = Path(jit.__file__).parent
    others = [path for path in root.rglob("*.py") if path.name != "jit.py" and "numba import njit" in path.read_text()]
    assert not others

    @jit.njit()
    def double(x):
        return 2 * x

    assert double(np.float32(2)) == 4
