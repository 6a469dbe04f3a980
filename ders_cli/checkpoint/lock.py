"""One run at a time in one folder: a lock that the kernel ends with its process, however that ends.

    OUT.partial/.ders-lock     flock(2), and who holds it as JSON {"pid", "host", "since"}

The file goes along when OUT.partial becomes OUT and is removed there, so nobody can take a lock in a folder that is about to be
renamed away. A file that a dead process left behind is not locked: the next run takes it.
"""

import errno
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from .files import of_file, pwrite_all

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # some network file systems: there a run goes without

PATIENCE = 0.5  # seconds


class LockedError(UsageError):
    """Another run works in the folder."""


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Make the folder if need be, and hold its lock file `name`. Raises LockedError naming the run that holds it."""
    handle = _take(folder, name)
    try:
        yield
    finally:
        os.close(handle)


def refuse_locked(folder: Path, name: str) -> None:
    """Raise LockedError if a run works in the folder. Looking takes a shared lock for a moment, which `locked` waits for."""
    try:
        handle = os.open(folder / name, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if not take(handle, fcntl.LOCK_SH):
            raise _refusal(handle, folder)
    finally:
        os.close(handle)


def _take(folder: Path, name: str) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # its run finished between the two calls, and the folder has its final name now
        try:
            with of_file(folder / name):
                if not _patiently(handle):
                    raise _refusal(handle, folder)
            if _is_at(handle, folder / name):
                note = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                with of_file(folder / name):
                    os.ftruncate(handle, 0)
                    pwrite_all(handle, json.dumps(note).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def take(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file until it is closed; False if another handle has it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _patiently(handle: int) -> bool:
    """`take`, tried for a while: somebody may only be looking."""
    until = time.monotonic() + PATIENCE
    while not take(handle):
        if time.monotonic() > until:
            return False
        time.sleep(PATIENCE / 20)
    return True


def _refusal(handle: int, folder: Path) -> LockedError:
    where = f"{folder}: another run is writing there"
    return LockedError(f"{where}: {_holder(handle)}; let it end, or -o names another place")


def _is_at(handle: int, path: Path) -> bool:
    """The file that was locked still has its name: it had another one's while we opened it, if that run ended meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        note = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(note['pid'])} on {note['host']}, since {note['since']}"
    except (ValueError, KeyError, TypeError):
        return "one that has just begun"
