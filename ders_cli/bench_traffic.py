"""What a run asks of the disk: recorded operation by operation, and done again by itself.

The second is the run's I/O-only twin: the same reads (file, place, size, by as many threads, each in its order), the same
writes to the same places of files that are made, sized, advised on, synchronised and renamed as the run's were, with
no arithmetic and no hash in between. Each thread reads into one buffer, used again and again, and writes from it. So it is
a lower bound for any run of the same pattern, and it does no less I/O: tests and `ders bench convert` compare what the
kernel counted for both.

A twin's threads wait for each other where the run's had to: a thread begins after those that were through before it
began, a file is changed as a whole (made, sized, synchronised, renamed) after and before the reads and writes that
stood so, and bytes are read back when they have been written. Nothing else holds it up.

Recorded are os.open, preadv, pwrite, ftruncate, fsync, posix_fadvise, ... and binary files of Python's own, of paths under
given folders. What goes by other ways is missed, which the kernel's count shows.
"""

import builtins
import io
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

BIN = 1 << 20  # bytes read back wait for those of the same bin
WHOLE = ("truncate", "allocate", "fsync", "rename", "unlink", "mkdir")  # of a file or folder as a whole


@dataclass(frozen=True)
class Operation:
    """One call. `handle` numbers the opens; `at` and `size` in bytes (for advise `flags` is the advice)."""

    thread: int
    kind: str
    path: str
    handle: int = -1
    at: int = 0
    size: int = 0
    flags: int = 0
    to: str = ""


@dataclass(frozen=True)
class Counted:
    """Bytes that this process has passed to read and write calls, as the kernel counts; 0 where it does not say."""

    read: int = 0
    written: int = 0

    @classmethod
    def now(cls) -> "Counted":
        try:
            fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        except OSError:
            return cls()
        return cls(int(fields["rchar"]), int(fields["wchar"]))

    def since(self, before: "Counted") -> "Counted":
        return Counted(self.read - before.read, self.written - before.written)


# --- recording


class Recorder:
    """`operations` in the order in which they were finished."""

    def __init__(self, folders: tuple[Path, ...]):
        self.operations: list[Operation] = []
        self._folders = tuple(f"{folder.resolve()}{os.sep}" for folder in folders)
        self._handles: dict[int, tuple[int, str]] = {}  # descriptor -> (number of the open, path)
        self._opens = 0
        self._lock = threading.Lock()

    def opened(self, path: Any, descriptor: int, flags: int) -> None:
        if where := self._within(path):
            with self._lock:
                self._opens += 1
                self._handles[descriptor] = (self._opens, where)
            self._note("open", where, self._opens, flags=flags)

    def closing(self, descriptor: int) -> None:
        """Before it is closed: another thread may be given the same descriptor at once."""
        handle, path = self._handles.pop(descriptor, (-1, ""))
        if path:
            self._note("close", path, handle)

    def of(self, descriptor: int, kind: str, at: int = 0, size: int = 0, flags: int = 0) -> None:
        """Something was done with an open file."""
        handle, path = self._handles.get(descriptor, (-1, ""))
        if path:
            self._note(kind, path, handle, at, size, flags)

    def named(self, kind: str, path: Any, to: Any = "") -> None:
        """Something was done with a name."""
        if where := self._within(path):
            self._note(kind, where, to=self._within(to) if to else "")

    def _within(self, path: Any) -> str:
        where = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        return where if f"{where}{os.sep}".startswith(self._folders) else ""

    def _note(self, kind: str, path: str, handle: int = -1, at: int = 0, size: int = 0, flags: int = 0, to: str = ""):
        self.operations.append(Operation(threading.get_ident(), kind, path, handle, at, size, flags, to))


class _File(io.FileIO):
    """A raw binary file whose reads and writes are noted; `seen` is set by the subclass that `recorded` makes."""

    seen: Recorder

    def __init__(self, path: Any, mode: str):
        super().__init__(path, mode)
        ways = {"r": os.O_RDONLY, "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "a": os.O_WRONLY | os.O_CREAT}
        self.seen.opened(path, self.fileno(), ways[mode[0]])

    def readinto(self, buffer: Any) -> int:
        at = self.tell()
        got = super().readinto(buffer)
        self.seen.of(self.fileno(), "read", at, got)
        return got

    def readall(self) -> bytes:
        at = self.tell()
        data = super().readall()
        self.seen.of(self.fileno(), "read", at, len(data))
        return data

    def write(self, data: Any) -> int:
        at = self.tell()
        done = super().write(data)
        self.seen.of(self.fileno(), "write", at, done)
        return done

    def close(self) -> None:
        if not self.closed:
            self.seen.closing(self.fileno())
        super().close()


@contextmanager
def recorded(*folders: Path) -> Iterator[list[Operation]]:
    """What this process does to files under the folders while the block runs. One at a time."""
    seen = Recorder(folders)
    raw = type("_Seen", (_File,), {"seen": seen})
    real = {name: getattr(os, name) for name in _HOOKS if hasattr(os, name)}
    plain_open = io.open

    def hooked(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: _HOOKS[name](seen, real[name], *args, **kwargs)

    def open_file(path: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        if mode not in ("rb", "wb", "ab") or buffering == 0 or isinstance(path, int):
            return plain_open(path, mode, buffering, *args, **kwargs)
        file = raw(path, mode[0])
        buffered = io.BufferedReader if mode == "rb" else io.BufferedWriter
        return buffered(file, os.fstat(file.fileno()).st_blksize if buffering < 0 else buffering)

    with ExitStack() as stack:
        for name in real:
            stack.enter_context(patch.object(os, name, hooked(name)))
        for module in (io, builtins):
            stack.enter_context(patch.object(module, "open", open_file))
        yield seen.operations


def _open(seen: Recorder, real: Callable, path: Any, flags: int, *rest: Any, **named: Any) -> int:
    descriptor = real(path, flags, *rest, **named)
    if named.get("dir_fd") is None:
        seen.opened(path, descriptor, flags)
    return descriptor


def _close(seen: Recorder, real: Callable, descriptor: int) -> None:
    seen.closing(descriptor)
    real(descriptor)


def _moves(kind: str, place: int) -> Callable:
    """read and write calls: bytes moved at the position that is argument number `place`."""

    def hook(seen: Recorder, real: Callable, descriptor: int, *args: Any) -> Any:
        moved = real(descriptor, *args)
        seen.of(descriptor, kind, args[place], len(moved) if isinstance(moved, bytes) else moved)
        return moved

    return hook


def _sendfile(seen: Recorder, real: Callable, out: int, source: int, offset: int, count: int) -> int:
    moved = real(out, source, offset, count)  # shutil's copy: both files at one position
    seen.of(source, "read", offset, moved)
    seen.of(out, "write", offset, moved)
    return moved


def _handled(kind: str) -> Callable:
    """Calls on a whole file, whose arguments are numbers."""

    def hook(seen: Recorder, real: Callable, descriptor: int, *args: int) -> None:
        real(descriptor, *args)
        at, size, flags = {"truncate": (0, *args, 0), "fsync": (0, 0, 0), "allocate": (*args, 0)}.get(kind, args)
        seen.of(descriptor, kind, at, size, flags)

    return hook


def _named(kind: str) -> Callable:
    def hook(seen: Recorder, real: Callable, path: Any, *args: Any, **named: Any) -> None:
        real(path, *args, **named)
        if named.get("dir_fd") is None:
            seen.named(kind, path, args[0] if kind == "rename" else "")

    return hook


_HOOKS = {
    "open": _open,
    "close": _close,
    "pread": _moves("read", 1),
    "preadv": _moves("read", 1),
    "pwrite": _moves("write", 1),
    "pwritev": _moves("write", 1),
    "sendfile": _sendfile,
    "ftruncate": _handled("truncate"),
    "posix_fallocate": _handled("allocate"),
    "posix_fadvise": _handled("advise"),
    "fsync": _handled("fsync"),
    "fdatasync": _handled("fsync"),
    "rename": _named("rename"),
    "replace": _named("rename"),
    "unlink": _named("unlink"),
    "remove": _named("unlink"),
    "mkdir": _named("mkdir"),
}


# --- the twin


class Twin:
    """Recorded operations, to be done again: reads where they were, everything under the folder `out` under `place`."""

    def __init__(self, operations: list[Operation], out: Path, place: Path):
        """The thread that calls stands for the recorded run's own."""
        self._main = threading.get_ident()
        self._out, self._place = str(out), str(place)
        self._lanes: dict[int, list[tuple[int, Operation]]] = defaultdict(list)
        for number, operation in enumerate(operations):
            self._lanes[operation.thread].append((number, operation))
        self._waits = waits(operations, self._main)
        random = np.random.default_rng(0)  # a file system may compress
        largest = max((operation.size for operation in operations if operation.kind in ("read", "write")), default=0)
        self._buffers = {thread: memoryview(bytearray(random.bytes(largest))) for thread in self._lanes}

    def run(self) -> None:
        """Everything once. Raises what a thread raised."""
        awaited = {number for needed in self._waits.values() for number in needed}
        marks = {number: threading.Event() for number in awaited}
        descriptors: dict[int, int] = {}
        failed: list[BaseException] = []

        def lane(thread: int) -> None:
            try:
                for number, operation in self._lanes[thread]:
                    for needed in self._waits.get(number, ()):
                        marks[needed].wait()
                    if failed:
                        return
                    self._do(operation, descriptors, self._buffers[thread])
                    if number in marks:
                        marks[number].set()
            except BaseException as error:
                failed.append(error)
                for mark in marks.values():  # nobody waits for what will not come
                    mark.set()

        threads = [threading.Thread(target=lane, args=(thread,)) for thread in self._lanes if thread != self._main]
        for thread in threads:
            thread.start()
        lane(self._main)
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _moved(self, path: str) -> str:
        return self._place + path[len(self._out) :] if path.startswith(self._out) else path

    def _do(self, operation: Operation, descriptors: dict[int, int], buffer: memoryview) -> None:
        kind, at, size = operation.kind, operation.at, operation.size
        handle = descriptors.get(operation.handle, -1)
        if kind == "read":
            while size > 0 and (got := os.preadv(handle, [buffer[:size]], at)):
                at, size = at + got, size - got
        elif kind == "write":
            while size > 0:
                done = os.pwrite(handle, buffer[:size], at)
                at, size = at + done, size - done
        elif kind == "open":
            descriptors[operation.handle] = os.open(self._moved(operation.path), operation.flags, 0o666)
        elif kind == "close":
            os.close(handle)
        elif kind == "truncate":
            os.ftruncate(handle, size)
        elif kind == "allocate":
            os.posix_fallocate(handle, at, size)
        elif kind == "advise":
            os.posix_fadvise(handle, at, size, operation.flags)
        elif kind == "fsync":
            os.fsync(handle)
        elif kind == "rename":
            os.replace(self._moved(operation.path), self._moved(operation.to))
        elif kind == "unlink":
            os.unlink(self._moved(operation.path))
        else:
            os.mkdir(self._moved(operation.path))


def waits(operations: list[Operation], main: int) -> dict[int, list[int]]:
    """Which operations of other threads each one has to wait for, by their numbers; see the module's text."""
    found: dict[int, list[int]] = {}
    last: dict[int, int] = {}  # thread -> its latest operation
    final = {operation.thread: number for number, operation in enumerate(operations)}
    through: set[int] = set()  # final operations of threads that are
    opened: dict[int, int] = {}  # handle -> its open
    used: dict[int, dict[int, int]] = defaultdict(dict)  # handle -> thread -> its latest operation with it
    touched: dict[str, dict[int, int]] = defaultdict(dict)  # path -> thread -> its latest operation there
    changed: dict[str, int] = {}  # path -> latest operation on the whole of it
    written: dict[tuple[str, int], int] = {}  # path, bin -> latest write
    known: dict[int, set[int]] = defaultdict(set)  # thread -> what it has waited for
    for number, operation in enumerate(operations):
        thread, kind, path = operation.thread, operation.kind, operation.path
        needed = set(through) if thread == main or thread not in last else set()
        if thread not in last and main in last:
            needed.add(last[main])
        if operation.handle in used:  # to close it, nobody may be using it
            users = used[operation.handle]
            needed |= set(users.values()) if kind == "close" else {opened[operation.handle]}
        whole = kind in WHOLE or (kind == "open" and operation.flags & (os.O_WRONLY | os.O_RDWR))
        own = {path, operation.to} - {""}
        for place in own | {os.path.dirname(each) for each in own if whole}:
            needed |= {changed[place]} if place in changed else set()
            if whole and place in own:
                needed |= set(touched[place].values())
                changed[place] = number
            touched[place][thread] = number
        bins = range(operation.at // BIN, (operation.at + max(0, operation.size - 1)) // BIN + 1)
        if kind == "read":
            needed |= {written[path, each] for each in bins if (path, each) in written}
        elif kind == "write":
            written |= {(path, each): number for each in bins}
        if operation.handle >= 0:
            used[operation.handle][thread] = number
            opened.setdefault(operation.handle, number)
        last[thread] = number
        if final[thread] == number:
            through.add(number)
        needed = {other for other in needed - known[thread] if operations[other].thread != thread}
        known[thread] |= needed
        if needed:
            found[number] = sorted(needed)
    return found
