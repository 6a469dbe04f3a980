"""Where numba keeps the machine code it compiled: a directory of this user's own, named after the sources.

numba looks for changes only in the file that a function stands in, so code inlined from another file would stay as it
was; and it writes beside the sources, where on a shared machine other users' code may lie, to be loaded and run.
Hence <cache>/ders/numba-<hash over all sources of this package and the Python version>, <cache> being $XDG_CACHE_HOME
or ~/.cache: used only if it and `ders` belong to this user and no one else can write there. Else, as without a home or
on a read-only disk, a private directory that is removed at exit; then every process compiles, tens of seconds.

A user's own NUMBA_CACHE_DIR is left alone. Ours is noted in DERS_NUMBA_CACHE as well, so that a process started from
this one, perhaps of other sources, does not take it for a user's.
"""

import atexit
import contextlib
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

VARIABLE, OURS = "NUMBA_CACHE_DIR", "DERS_NUMBA_CACHE"
NAME = re.compile(r"numba-[0-9a-f]{12}")
LEFT = 3  # directories of other sources that stay
UNUSED_SECONDS = 24 * 3600  # those used since then stay too: their process may be running


def choose() -> None:
    """Tell numba its directory, by the environment and, where it is imported already, by its configuration."""
    set_by_user = os.environ.get(VARIABLE) not in (None, "", os.environ.get(OURS))
    config = getattr(sys.modules.get("numba"), "config", None)
    if set_by_user or getattr(config, "CACHE_DIR", "") not in ("", os.environ.get(OURS)):
        return
    folder = str(own_directory(Path(__file__).parent) or _private_directory())
    os.environ[VARIABLE] = os.environ[OURS] = folder
    if config is not None:
        config.CACHE_DIR = folder


def own_directory(sources: Path) -> Path | None:
    """The directory for the sources' present contents, made if need be; None where it would not be safe or writable."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = root if root.is_absolute() else Path(os.path.expanduser("~"), ".cache")
    if not root.is_absolute():
        return None
    try:
        folder = root / "ders" / f"numba-{digest(sources)}"
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(root.stat()):  # root who keeps a user's home would leave directories that the user cannot use
            return None
        for made in (folder.parent, folder):
            made.mkdir(mode=0o700, exist_ok=True)
            found = made.lstat()
            if not stat.S_ISDIR(found.st_mode) or not _is_own(found) or _others_write(found):
                return None
        tempfile.TemporaryFile(dir=folder).close()
        os.utime(folder)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # another process may be removing the same
        _remove_old(folder)
    return folder


def digest(sources: Path) -> str:
    """12 hex digits, of the names and contents of all Python files below `sources` and of this Python's version.

    Code that checks its bounds, which numba does not tell from the other, has a directory of its own.
    """
    seen = hashlib.sha256(sys.version.encode())
    if os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0"):
        seen.update(b"checked")
    for path in sorted(sources.rglob("*.py")):
        content = path.read_bytes()
        seen.update(f"\0{path.relative_to(sources)}\0{len(content)}\0".encode() + content)
    return seen.hexdigest()[:12]


def _is_own(found: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or found.st_uid == os.geteuid()


def _others_write(found: os.stat_result) -> bool:
    return os.name == "posix" and bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _remove_old(folder: Path) -> None:
    """Remove what other sources left beside `folder`, but the last used."""
    others = []
    for entry in os.scandir(folder.parent):
        if NAME.fullmatch(entry.name) and entry.name != folder.name and entry.is_dir(follow_symlinks=False):
            others.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
    for used, path in sorted(others, reverse=True)[LEFT:]:
        if used < time.time() - UNUSED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _private_directory() -> str:
    """A new directory that only this user can enter, removed when this process (not a fork of it) ends."""
    folder, process = tempfile.mkdtemp(prefix="ders-numba-"), os.getpid()
    atexit.register(lambda: os.getpid() == process and shutil.rmtree(folder, ignore_errors=True))
    return folder
