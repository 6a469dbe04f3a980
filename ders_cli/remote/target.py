"""Where an output goes: stays where it was written, or is sent to a bucket shard by shard.

    OUT.partial here (in scratch) -> each finished shard: sent, noted, removed here
                                  -> the other files -> index -> ders.json -> config.json

config.json, without which nothing opens a checkpoint, is sent last, so an interrupted upload is never taken for one.
A mark beside the shards says that a run of ders has begun there; it goes when the checkpoint is whole.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.manifest import MANIFEST, write_file
from ..checkpoint.reader import INDEX
from ..errors import DersError, UsageError
from .address import is_remote, open_store
from .store import Entry, Store, patiently

LAST = (INDEX, MANIFEST, "config.json")  # in this order, and deleted in the other


class Target:
    """Nowhere else: the output is the folder that was written."""

    def shown(self, out: Path) -> str:
        """The output as the user knows it."""
        return str(out)

    def make_room(self) -> None:
        """Before OUT.partial is begun."""

    def begin(self, mark: Path, again: bool) -> None:
        """OUT.partial has been begun, or its run goes on (`again`); `mark` is a file in it."""

    def put(self, path: Path) -> None:
        """A finished weight file of OUT.partial."""

    def has(self, path: Path) -> bool:
        """An earlier run has finished this weight file."""
        return path.exists()


@dataclass(frozen=True)
class Upload(Target):
    """A folder in a bucket. `mark`: the name of the file that an unfinished run keeps there."""

    store: Store
    mark: str
    top: Path  # the folder in scratch that holds OUT.partial

    def shown(self, out: Path) -> str:
        return self.store.address

    def put(self, path: Path) -> None:
        """Send a file, note that it was, remove it here. Raises DersError when it could not be sent."""
        self._send(path)
        write_file(self._note(path), str(path.stat().st_size).encode())
        path.unlink()

    def has(self, path: Path) -> bool:
        note, entry = self._note(path), self._listing().get(path.name)
        return note.exists() and entry is not None and str(entry.size) == note.read_text()

    def refuse_occupied(self, overwrite: bool, resume: bool, inputs: Iterable[str]) -> None:
        """Raise UsageError if something stands there that may not be replaced; an input never may."""
        here = self.store.address.rstrip("/")
        for other in (address.rstrip("/") for address in inputs):
            if f"{other}/".startswith(f"{here}/"):
                raise UsageError(f"{here}: the input {other} stands there; -o names another place")
        listing = self._listing()
        if not listing or (self.mark in listing and (overwrite or resume)):
            return
        if self.mark in listing:
            raise UsageError(f"{here}: an unfinished run stands here; --resume continues it, --overwrite starts again")
        if not overwrite:
            raise UsageError(f"{here}: exists and is not empty; --overwrite replaces it, -o names another place")
        if "config.json" not in listing:
            raise UsageError(
                f"{here}: has no config.json, so --overwrite does not take it for a checkpoint; remove it yourself"
            )

    def make_room(self) -> None:
        """A folder that nobody else may enter; DersError if it is somebody else's."""
        self.top.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.top.is_symlink() or (hasattr(os, "getuid") and self.top.stat().st_uid != os.getuid()):
            raise DersError(f"{self.top}: belongs to somebody else; --scratch names another folder")

    def begin(self, mark: Path, again: bool) -> None:
        """Make place: what is there goes, first what makes it a checkpoint. `again`: shards of the last run stay."""
        self.store.abort_unfinished()
        listing = self._listing()
        files = [name for name, entry in listing.items() if entry is not None and name != self.mark]
        first = [name for name in reversed(LAST) if name in files]
        for names in (first, [] if again else [name for name in files if name not in first]):
            patiently(lambda names=names: self.store.remove(names), self.store.address)
        if self.mark not in listing:
            self._send(mark)

    def publish(self, files: list[Path]) -> None:
        """Send what is left in OUT.partial, and last what makes it a checkpoint."""
        for path in sorted(files, key=lambda path: LAST.index(path.name) if path.name in LAST else -1):
            self._send(path)
        patiently(lambda: self.store.remove([self.mark]), self.store.address)

    def size(self) -> int:
        """Bytes of all files that stand there."""
        return sum(entry.size for entry in self._listing().values() if entry is not None)

    def _send(self, path: Path) -> None:
        patiently(lambda: self.store.put(path, path.name), f"{self.store.where(path.name)}: sending it")

    def _note(self, path: Path) -> Path:
        return path.with_name(f"{self.mark}.{path.name}")

    def _listing(self) -> dict[str, Entry | None]:
        return patiently(self.store.listing, self.store.address)


def open_target(location: str, mark: str, scratch: Path | None) -> tuple[Path, Target]:
    """A remote output: the local folder that stands for it until it is sent, and where it goes.

    The local folder is the same in every run to this address, for --resume; nobody else may enter it.
    """
    if not is_remote(location) or not location.lower().startswith(("s3://", "gs://")):
        hint = (
            "; write it to a folder, then `hf upload ORGANISATION/MODEL FOLDER`" if location.startswith("hf:") else ""
        )
        raise UsageError(f"{location}: can be read, not written: -o takes a folder, s3://... or gs://...{hint}")
    store = open_store(location)
    key = hashlib.sha256(location.rstrip("/").encode()).hexdigest()[:16]
    top = (scratch or Path(tempfile.gettempdir())) / f"ders-to-{store.name}-{key}"
    return top / store.name, Upload(store, mark, top)
