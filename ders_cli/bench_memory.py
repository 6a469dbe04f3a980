"""A run without a disk: its files in memory, its output thrown away. What is left is the run's computing.

Reads of held files copy from memory, or, where a plain checkpoint's rows are asked for, give them as they lie there.
Writes below the output's folder move nothing; its files keep their sizes, so that the run goes on as it would, and what
is read back from them is left as the buffer was. A hash takes as long, whatever it hashes.
"""

import builtins
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from .checkpoint.tensor import STORAGE
from .layouts import ExpertGroup
from .source import PlainSource, Source


class Held:
    """Every weight file of some checkpoints, in memory: resolved path -> uint8 array."""

    def __init__(self, folders: list[Path]):
        self.files: dict[str, np.ndarray] = {}
        for folder in folders:
            for path in sorted(folder.glob("*.safetensors")):
                self.files[str(path.resolve())] = np.fromfile(path, np.uint8)

    @staticmethod
    def fits(folders: list[Path]) -> bool:
        """Whether they would take less than half of the memory that programs may have."""
        size = sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
        kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)
        return size < kilobytes * 1024 / 2

    def lend(self, source: Source) -> Source:
        """Let a plain source give rows of contiguous matrices from here, not copied."""
        if not isinstance(source, PlainSource):
            return source
        from_file = source.read

        def read(group: ExpertGroup, member: int, rows: slice) -> np.ndarray:
            view, columns = group.members[member][1], group.shape[1]
            storage, place = STORAGE[group.dtype], source.reader.places[view.tensor]
            begin = place.begin + (view.offset + rows.start * columns) * storage.itemsize
            if (view.row_stride, view.column_stride) != (columns, 1) or begin % storage.itemsize:
                return from_file(group, member, rows)
            count = (rows.stop - rows.start) * columns
            held = self.files[str((source.reader.folder / place.file).resolve())]
            return held[begin : begin + count * storage.itemsize].view(storage).reshape(-1, columns)

        source.read = read
        return source


class _Thrown(io.FileIO):
    """A new file that takes bytes and keeps their number."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.seek(size, os.SEEK_CUR)
        return size

    def close(self) -> None:
        if not self.closed:
            self.truncate(self.tell())
        super().close()


@contextmanager
def without_disk(held: Held, out: Path) -> Iterator[None]:
    """While the block runs, weight files that are held are read from memory and files under `out` take no bytes."""
    real, plain_open = {name: getattr(os, name) for name in _CALLS if hasattr(os, name)}, io.open
    inputs: dict[int, np.ndarray] = {}
    outputs: set[int] = set()

    def is_out(path: Any) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(str(out))

    def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        descriptor = real["open"](path, flags, *rest, **named)
        if is_out(path) and flags & (os.O_WRONLY | os.O_RDWR):
            outputs.add(descriptor)
        elif (kept := held.files.get(os.path.realpath(path))) is not None:
            inputs[descriptor] = kept
        return descriptor

    def closed(descriptor: int) -> None:
        inputs.pop(descriptor, None)
        outputs.discard(descriptor)
        real["close"](descriptor)

    def read(descriptor: int, buffers: list[Any], at: int, *flags: int) -> int:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        if descriptor in outputs:
            return sum(len(view) for view in views)
        if descriptor not in inputs:
            return real["preadv"](descriptor, buffers, at, *flags)
        got = 0
        for view in views:
            part = inputs[descriptor][at + got : at + got + len(view)]
            np.frombuffer(view, np.uint8)[: len(part)] = part
            got += len(part)
        return got

    def write(descriptor: int, data: Any, at: int) -> int:
        return memoryview(data).nbytes if descriptor in outputs else real["pwrite"](descriptor, data, at)

    def synced(descriptor: int) -> None:
        """Nothing to keep."""

    def allocated(descriptor: int, begin: int, size: int) -> None:
        if descriptor not in outputs:
            real["posix_fallocate"](descriptor, begin, size)

    def advised(descriptor: int, *args: int) -> None:
        if descriptor not in inputs:
            real["posix_fadvise"](descriptor, *args)

    def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb" and not isinstance(path, int) and is_out(path):
            return io.BufferedWriter(_Thrown(path, "w"))
        return plain_open(path, mode, *args, **kwargs)

    hooks = dict(zip(_CALLS, (opened, closed, read, write, synced, allocated, advised), strict=True))
    with ExitStack() as stack:
        for name in real:
            stack.enter_context(patch.object(os, name, hooks[name]))
        for module in (io, builtins):
            stack.enter_context(patch.object(module, "open", open_file))
        yield


_CALLS = ("open", "close", "preadv", "pwrite", "fsync", "posix_fallocate", "posix_fadvise")
