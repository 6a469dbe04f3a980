"""A remote checkpoint, read as if it were here: bytes are fetched into a sparse local folder when they are wanted.

A weight file is cut into pieces: a tensor of more than PIECE bytes has pieces of its own, smaller neighbours share one.
A piece is fetched once, by whoever comes first, and let go when all its tensors are `done`. Reading waits for its
pieces, so what is not there yet never reads as zeros.

    scratch held = pieces fetched and not let go: those being read, and AHEAD bytes of what is expected
"""

import os
import tempfile
import weakref
from bisect import bisect_right
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, RLock
from typing import Any

import numpy as np

from ..checkpoint.disk import punch
from ..checkpoint.reader import CheckpointReader
from ..errors import DersError
from .address import is_remote, local_path, open_store
from .mirror import PIECE, fill, make_mirror, remove, stamp
from .store import AT_ONCE, Entry, Store, fetch, patiently

AHEAD = 1 << 30  # bytes on disk beyond which nothing is fetched that is only expected


@dataclass
class Piece:
    """A range of a weight file. `users`: tensors not yet done with it; `readers`: threads that read from it now."""

    file: str
    begin: int
    end: int
    users: set[str] = field(default_factory=set)
    readers: int = 0
    future: Future | None = None  # None: not here

    @property
    def size(self) -> int:
        return self.end - self.begin


class RemoteReader(CheckpointReader):
    """A CheckpointReader of a store. `folder` is its mirror: private, removed by `close` or at the process's end.

    Pickled, it opens a mirror of its own where it arrives, and refuses files that are not those opened here.
    """

    def __init__(self, store: Store, scratch: Path | None = None, expected: dict[str, Entry | None] | None = None):
        self.store, self._scratch = store, scratch
        self.listing = patiently(store.listing, store.address) if expected is None else expected
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        top = Path(tempfile.mkdtemp(prefix=f"ders-{store.name}-", dir=scratch))  # mode 0700
        self._remove = weakref.finalize(self, remove, top)
        self.fetched = self.held = self.most_held = 0  # bytes: in all, on disk now, and at most
        folder = top / store.name
        try:
            folder.mkdir()
            self.fetched += make_mirror(store, self.listing, folder)
            super().__init__(folder)
        except DersError as error:
            self._remove()
            raise type(error)(str(error).replace(str(folder), store.address)) from None
        except BaseException:
            self._remove()
            raise
        self.address = store.address
        self._lock, self._stop, self._ahead, self._flying = RLock(), Event(), deque(), 0
        self._punches = True  # until a file system says that it cannot give room back; then scratch is not bounded
        self._pool = ThreadPoolExecutor(AT_ONCE, "fetch")
        self._pieces = {file: self._cut(file) for file in self.files}
        self._begins = {file: [piece.begin for piece in pieces] for file, pieces in self._pieces.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteReader, (self.store, self._scratch, self.listing)

    def _cut(self, file: str) -> list[Piece]:
        """A file's pieces, in order and without gaps from its first tensor to its end."""
        pieces: list[Piece] = []
        joins = False
        for name, spec in self.headers[file].tensors.items():
            begin = self.places[name].begin
            if not spec.nbytes:
                continue
            if joins and spec.nbytes <= PIECE and begin + spec.nbytes - pieces[-1].begin <= PIECE:
                pieces[-1].end = begin + spec.nbytes
                pieces[-1].users.add(name)
                continue
            for at in range(begin, begin + spec.nbytes, PIECE):
                pieces.append(Piece(file, at, min(at + PIECE, begin + spec.nbytes), {name}))
            joins = spec.nbytes <= PIECE
        return pieces

    def _of(self, name: str, begin: int, end: int) -> list[Piece]:
        """Pieces that hold bytes begin ... end of a tensor."""
        if end <= begin:
            return []
        place = self.places[name]
        begins = self._begins[place.file]
        first = bisect_right(begins, place.begin + begin) - 1
        return self._pieces[place.file][first : bisect_right(begins, place.begin + end - 1)]

    def read_bytes(self, name: str, begin: int, out: np.ndarray) -> None:
        with self._here(name, begin, begin + out.nbytes):
            super().read_bytes(name, begin, out)

    @contextmanager
    def _here(self, name: str, begin: int, end: int):
        """While this lasts, the bytes are in the mirror."""
        with self._lock:
            pieces = self._of(name, begin, end)
            for piece in pieces:
                piece.users.add(name)
                piece.readers += 1
            futures = [self._want(piece) for piece in pieces]
        try:
            for future in futures:
                future.result()
            yield
        finally:
            with self._lock:
                for piece in pieces:
                    piece.readers -= 1
                    self._let_go_if_unused(piece)

    def expect(self, name: str) -> None:
        with self._lock:
            for piece in self._of(name, 0, self.tensors[name].nbytes):
                piece.users.add(name)
                if piece.future is None:
                    self._ahead.append(piece)
            self._begin_more()

    def check_unchanged(self) -> None:
        """The mirror is ours, and its files' times change as it fills; each request asks for the file that was listed."""

    def done(self, name: str) -> None:
        if name not in self.places:
            return
        with self._lock:
            for piece in self._of(name, 0, self.tensors[name].nbytes):
                piece.users.discard(name)
                self._let_go_if_unused(piece)
            self._begin_more()

    # --- with the lock held

    def _want(self, piece: Piece) -> Future:
        if piece.future is None:
            self._flying += 1
            self.held += piece.size
            self.most_held = max(self.most_held, self.held)
            piece.future = future = self._pool.submit(self._fetch, piece)
            future.add_done_callback(lambda future: self._landed(piece, future))
            return future
        return piece.future

    def _begin_more(self) -> None:
        """Begin what is expected, as far as connections are free and the bound on scratch allows."""
        while self._ahead and self._flying < AT_ONCE:
            if self._punches and self.held + self._ahead[0].size > AHEAD:
                break
            piece = self._ahead.popleft()
            if piece.future is None and piece.users:
                self._want(piece)

    def _let_go_if_unused(self, piece: Piece) -> None:
        if piece.future is None or not _is_here(piece.future) or piece.users or piece.readers:
            return
        path = self.folder / piece.file
        handle = os.open(path, os.O_WRONLY)
        try:
            self._punches = punch(handle, piece.begin, piece.size)
            if self._punches:
                piece.future = None
                self.held -= piece.size
        finally:
            os.close(handle)
        stamp(path, self.listing[piece.file])

    # --- in the pool's threads

    def _fetch(self, piece: Piece) -> None:
        entry = self.listing[piece.file]
        data = fetch(self.store, piece.file, piece.begin, piece.end, entry, self._stop)
        fill(self.folder / piece.file, piece.begin, data, entry)
        with self._lock:
            self.fetched += piece.size

    def _landed(self, piece: Piece, future: Future) -> None:
        with self._lock:
            self._flying -= 1
            if piece.future is future and not _is_here(future):  # it may have been let go and wanted again meanwhile
                piece.future = None  # those who wait get the error; who comes later tries again
                self.held -= piece.size
            elif not self._stop.is_set():
                self._let_go_if_unused(piece)
            if not self._stop.is_set():
                self._begin_more()

    def close(self) -> None:
        with self._lock:
            self._stop.set()
            self._ahead.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()
        self._remove()


def _is_here(future: Future) -> bool:
    """A download has ended well."""
    return future.done() and not future.cancelled() and future.exception() is None


def open_reader(location: str | Path, scratch: Path | None = None) -> CheckpointReader:
    """The checkpoint in a folder or at an address. Raises UsageError, CheckpointError, DersError."""
    if is_remote(location):
        return RemoteReader(open_store(str(location)), scratch)
    return CheckpointReader(local_path(location))
