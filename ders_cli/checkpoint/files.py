"""Files that strangers made: opened only if they are regular, read within a bound, and known again; and ours, written whole.

A name in a checkpoint may be a FIFO (opening it waits for ever), a device (`/dev/zero` has no end), a socket or a loop of
links. So a file is looked at before it is opened, opened without waiting, and looked at again.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file was when it was opened. Size and time say whether it was written to, on whatever node one looks; inode
    and device whether another file has its name, on one node."""

    size: int  # bytes
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Stamp":
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev)

    def difference(self, now: "Stamp", same_node: bool = True) -> str:
        """What has happened to the file since, or ""."""
        if same_node and (now.inode, now.device) != (self.inode, self.device):
            return "was replaced by another file"
        if now.size != self.size:
            return f"went from {self.size} bytes to {now.size}"
        return "was written to" if now.mtime_ns != self.mtime_ns else ""


def open_regular(path: Path, what: str) -> tuple[int, Stamp]:
    """A descriptor to read from, and what it is of. CheckpointError if there is nothing or no file; `what` was expected."""
    try:
        _refuse_irregular(path, path.stat().st_mode, what)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CheckpointError(f"{path}: a link that leads back to itself; expected {what}") from None
        if error.errno in ABSENT and os.path.islink(path):
            raise CheckpointError(
                f"{path}: a link to {os.readlink(path)!r:.200}, where nothing is; expected {what}"
            ) from None
        if error.errno in ABSENT:
            raise CheckpointError(f"{path}: missing; expected {what}. Is the checkpoint complete?") from None
        raise
    try:
        found = os.fstat(handle)
        _refuse_irregular(path, found.st_mode, what)
    except BaseException:
        os.close(handle)
        raise
    return handle, Stamp.of(found)


def _refuse_irregular(path: Path, mode: int, what: str) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: expected {what}, found {KINDS.get(stat.S_IFMT(mode), 'no regular file')}")


def read_at(handle: int, path: Path, begin: int, size: int) -> bytes:
    """Up to `size` bytes from byte `begin` on; fewer where the file ends. Raises OSError with the file's name."""
    pieces, at = [], begin
    try:
        while at < begin + size and (piece := os.pread(handle, min(begin + size - at, 1 << 30), at)):
            pieces.append(piece)
            at += len(piece)
    except OSError as error:
        raise named(error, path) from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_small(path: Path, most: int, what: str) -> tuple[bytes, Stamp]:
    """All of a file of at most `most` bytes, and what it was. Raises CheckpointError."""
    handle, stamp = open_regular(path, what)
    try:
        if stamp.size > most:
            raise CheckpointError(f"{path}: {what} of {stamp.size} bytes; expected at most {most}")
        return read_at(handle, path, 0, stamp.size), stamp
    finally:
        os.close(handle)


def named(error: OSError, path: Path) -> OSError:
    """The same error with the file's name, which calls on a descriptor leave out."""
    return OSError(error.errno, error.strerror, str(path))


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """An OSError of a call on a descriptor gets the file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def pwrite_all(handle: int, data: np.ndarray | bytes, at: int) -> None:
    """Write every byte at a position of a file."""
    view = memoryview(data) if isinstance(data, bytes) else memoryview(data.reshape(-1).view(np.uint8))
    while len(view):
        done = os.pwrite(handle, view, at)
        view, at = view[done:], at + done
