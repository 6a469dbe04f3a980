"""Writing a safetensors file while its tensors arrive in any order, from any thread.

The size of every fixed tensor is known when the file is opened, so each has its place: a block is written there
by pwrite whenever it is ready, and hashed on the way if it comes in order. Tensors whose size is known only after
encoding are spooled, and go behind the others, in order, when they are complete. The header goes last, into space reserved
for it; then fsync, then rename. A file under its final name is whole. What is finished of one that is not stands in a
journal, and a later writer of the same file goes on behind it.
"""

import errno
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from .disk import allocate
from .files import of_file, pwrite_all
from .journal import Journal
from .tensor import TensorSpec

CHUNK = 4 << 20
LARGEST_BYTES = 10**15  # what a number in a header may grow to: the header's space is reserved for it


def header_text(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None) -> bytes:
    """The header that safetensors' own writer makes: compact JSON, padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, spec in tensors.items():
        end = position + spec.nbytes
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def reserved_header_bytes(fixed: Mapping[str, TensorSpec], appended: Iterable[str]) -> int:
    """Bytes kept free for the header of a file whose appended tensors have unknown sizes."""
    bound = dict(fixed) | {name: TensorSpec((LARGEST_BYTES,), "U8") for name in appended}
    return len(header_text(bound, None))


class RunningHash:
    """BLAKE3 of one tensor in equal slices, each fed from its front to its back while it is written."""

    def __init__(self, size: int, slices: int):
        self._size, self.found = size // slices, [""] * slices  # hex digests of finished slices
        self._open: dict[int, tuple[int, blake3]] = {}  # slice -> bytes so far, digest

    def update(self, begin: int, data: memoryview) -> None:
        """Bytes from byte `begin` of the tensor on. A slice that doesn't come in order is given up: its digest stays ""."""
        while len(data):
            number, at = divmod(begin, self._size)
            part = data[: self._size - at]
            done, digest = self._open.pop(number, (0, None)) if at else (0, blake3())
            self.found[number] = ""
            if digest is not None and done == at:
                digest.update(part)
                if at + len(part) == self._size:
                    self.found[number] = digest.hexdigest()
                else:
                    self._open[number] = (at + len(part), digest)
            data, begin = data[len(part) :], begin + len(part)


class ShardWriter:
    """One output file. `write` may be called from any thread, for one tensor from one at a time; `append` and `close`
    from one, after the writes."""

    def __init__(
        self,
        path: Path,
        fixed: Mapping[str, TensorSpec],
        appended: Iterable[str] = (),
        header: bytes = b"",
        slices: Mapping[str, int] | None = None,
        journal: Path | None = None,
        resume: bool = False,
    ):
        """`fixed` tensors in file order; `appended` names follow them. `header`: write exactly this one (restore).

        `slices`: hash every tensor, in so many equal slices of its bytes (1 where not given); None: no hashes are wanted.
        `journal`: a file that keeps what is finished; with `resume` the one that stands there is gone on with.
        """
        self.path, self.tensors, self._awaited, self._header = path, dict(fixed), list(appended), header
        self._data = 8 + (len(header) or reserved_header_bytes(fixed, self._awaited))
        self._begins, position = {}, self._data
        for name, spec in fixed.items():
            self._begins[name], position = position, position + spec.nbytes
        self._end = position
        counts = {} if slices is None else {name: slices.get(name, 1) for name in self.tensors}
        self._hashes = {name: RunningHash(fixed[name].nbytes, count) for name, count in counts.items()}
        self.finished: dict[str, Any] = {}  # the parts that an earlier run has finished, and what it noted of them
        self._journal = None
        if journal is not None:
            with of_file(journal):
                self._journal = Journal(journal, resume)
        try:
            self._open(position)
        except BaseException:
            self._close_journal()
            raise

    def _open(self, size: int) -> None:
        """The unfinished file: the one that the journal tells of, or a new one of `size` bytes."""
        if self._journal and self._journal.done and not _reaches(self._named(self._journal.token), size):
            with of_file(self._journal.path):
                self._journal.close()
                self._journal.begin()
        # A name of its own: of two attempts at one file, both alive where a cluster took the first for dead, the later one
        # takes away what the earlier one wrote, and the two never write into one file.
        token = self._journal.token if self._journal else secrets.token_hex(4)
        self._partial = self._named(token)
        attempt = re.compile(re.escape(self.path.name) + r"\.([0-9a-f]{8})(\.\d+)?\.partial")
        for left in self.path.parent.iterdir():
            if (found := attempt.fullmatch(left.name)) and found[1] != token:
                left.unlink(missing_ok=True)
        self._handle = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if self._journal and self._journal.done:
                self._recall(self._journal.done)
            else:
                with of_file(self._partial):
                    allocate(self._handle, size)
        except BaseException:
            os.close(self._handle)
            raise

    def _named(self, token: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{token}.partial")

    def _recall(self, done: dict[str, Any]) -> None:
        for key, (hashes, noted) in done.items():
            self.finished[key] = noted
            for name, found in hashes.items():
                if name in self._hashes:
                    self._hashes[name].found = found

    def finish(self, key: str, names: Iterable[str], noted: Any = None) -> None:
        """A part is written, all of the fixed tensors `names` or its share of them; a later run need not do it again."""
        if self._journal:
            hashes = {name: self._finished(name, self._hashes[name].found) for name in names if name in self._hashes}
            with of_file(self._journal.path):
                self._journal.add(key, [hashes, noted])

    def write(self, name: str, begin: int, data: np.ndarray) -> None:
        """Write contiguous data at byte `begin` of a fixed tensor."""
        assert 0 <= begin <= begin + data.nbytes <= self.tensors[name].nbytes, (name, begin, data.nbytes)
        data = np.ascontiguousarray(data)
        with of_file(self._partial):
            pwrite_all(self._handle, data, self._begins[name] + begin)
        if name in self._hashes:
            self._hashes[name].update(begin, memoryview(data.reshape(-1).view(np.uint8)))

    def write_view(self, name: str, offset: int, strides: tuple[int, int], row: int, block: np.ndarray) -> None:
        """The inverse of `read_view`: put rows `row`... of a strided [out, in] matrix in their places.

        Elements between the strides are kept: matrices that interleave in one tensor must be written one by one.
        """
        size, (rows, columns) = block.itemsize, block.shape
        row_stride, column_stride = strides
        if column_stride == 1 and row_stride == columns:
            return self.write(name, (offset + row * row_stride) * size, block)
        if column_stride != 1:  # one line per input column, its elements row_stride apart
            block, lines, step, line_step = block.T, columns, row_stride, column_stride
        else:
            lines, step, line_step = rows, 1, row_stride
        first = offset + row * row_stride
        for line in range(lines):
            at, data = first + line * line_step, np.ascontiguousarray(block[line])
            if step != 1:
                span = np.empty((data.size - 1) * step + 1, block.dtype)
                self.read_back(name, at * size, span)
                span[::step] = data
                data = span
            self.write(name, at * size, data)

    def read_back(self, name: str, begin: int, out: np.ndarray) -> None:
        """Read what was written, to check it, to hash it or to write around it."""
        view, at = memoryview(out.reshape(-1).view(np.uint8)), self._begins[name] + begin
        with of_file(self._partial):
            while len(view):
                got = os.preadv(self._handle, [view], at)
                if got == 0:
                    raise OSError(errno.EIO, "is shorter than what was written to it")
                view, at = view[got:], at + got

    def spool(self, number: int) -> Path:
        """A file for what will be appended, of this attempt alone; the next attempt takes it away too."""
        return self._partial.with_suffix(f".{number}.partial")

    def append(self, name: str, spec: TensorSpec, chunks: Iterable[np.ndarray | bytes]) -> None:
        """Put a tensor of now known size behind all others. Names come in the order given at the start."""
        running = self._place(name, spec)
        for chunk in chunks:
            view = memoryview(chunk).cast("B") if isinstance(chunk, bytes) else memoryview(chunk)
            with of_file(self._partial):
                pwrite_all(self._handle, chunk, self._end)
            running.update(self._end - self._begins[name], view)
            self._end += view.nbytes
        assert self._end - self._begins[name] == spec.nbytes, name

    def spooled(self, name: str, spool: Path) -> bool:
        """Whether what is to be appended under this name is there: spooled, or appended already."""
        return spool.exists() or f"appended {name}" in self.finished

    def append_spool(self, name: str, spool: Path) -> None:
        """Move a spooled file behind all others, as U8, if an earlier run has not done so."""
        key = f"appended {name}"
        if key in self.finished:
            size, found = self.finished[key]
            self._place(name, TensorSpec((size,), "U8")).found = found
            self._end += size
        else:
            size = spool.stat().st_size
            with spool.open("rb") as file:
                self.append(name, TensorSpec((size,), "U8"), iter(lambda: file.read(CHUNK), b""))
            self.finish(key, [], [size, self._finished(name, self._hashes[name].found)])
        spool.unlink(missing_ok=True)

    def _place(self, name: str, spec: TensorSpec) -> RunningHash:
        assert name == self._awaited.pop(0), name
        self.tensors[name], self._begins[name] = spec, self._end
        self._hashes[name] = RunningHash(spec.nbytes, 1)
        return self._hashes[name]

    def hashes(self) -> dict[str, list[str]]:
        """BLAKE3 of every tensor's bytes, in its slices. What was not written in order is read back from the file."""
        return {name: self._finished(name, running.found) for name, running in self._hashes.items()}

    def _finished(self, name: str, found: list[str]) -> list[str]:
        size = self.tensors[name].nbytes // len(found)
        return [digest or self._read_hash(name, number * size, size) for number, digest in enumerate(found)]

    def _read_hash(self, name: str, first: int, size: int) -> str:
        digest, buffer = blake3(), np.empty(CHUNK, np.uint8)
        for begin in range(0, size, buffer.size):
            part = buffer[: min(buffer.size, size - begin)]
            self.read_back(name, first + begin, part)
            digest.update(part)
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the file, when all has been appended."""
        return self._end

    def close(self) -> int:
        """Header, fsync, rename. Returns the bytes of the file."""
        assert not self._awaited, self._awaited
        text = self._header or header_text(self.tensors, None)
        text += b" " * (self._data - 8 - len(text))
        assert len(text) == self._data - 8
        with of_file(self._partial):
            pwrite_all(self._handle, len(text).to_bytes(8, "little") + text, 0)
            try:
                os.fsync(self._handle)
            except OSError:
                if self._journal:
                    self._journal.remove()  # the kernel may have dropped what it could not write: nothing here is finished
                raise
        self.abandon()
        os.replace(self._partial, self.path)
        return self._end

    def abandon(self) -> None:
        """Close what is open; the `.partial` file stays behind for the next run to go on with, or to replace."""
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            os.close(handle)
        self._close_journal()

    def _close_journal(self) -> None:
        if self._journal:
            self._journal.close()
            self._journal = None


def _reaches(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size >= size
    except OSError:
        return False


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with of_file(folder):
            os.fsync(handle)
    finally:
        os.close(handle)
