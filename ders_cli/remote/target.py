"""Where an output goes: stays where it was written, or is sent to a bucket shard by shard.

    OUT.partial here (in scratch) -> each finished shard: sent, noted, removed here
                                  -> the other files -> index -> ders.json -> config.json

config.json, without which nothing opens a checkpoint, is sent last, so an interrupted upload is never taken for one.
A mark beside the shards says that a run of ders has begun there; it goes when the checkpoint is whole. A note of what was
sent has the size and the store's own mark (ETag, generation): a file that somebody else has replaced since is not ours.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.manifest import MANIFEST, write_file
from ..checkpoint.reader import INDEX
from ..errors import DersError, UsageError
from .address import is_remote, normal, open_store
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
        entry = self._send(path)
        write_file(self._note(path), json.dumps([entry.size, entry.mark]).encode())
        path.unlink()

    def has(self, path: Path) -> bool:
        sent = _read_note(self._note(path))
        return sent is not None and self._listing().get(path.name) == sent

    def refuse_occupied(self, overwrite: bool, resume: bool, inputs: Iterable[str]) -> None:
        """Raise UsageError if something stands there that may not be replaced; an input never may."""
        here = self.store.address
        for other in inputs:
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
        """Make place: what is there goes, first what makes it a checkpoint. `again`: shards of the last run stay.

        The mark comes before all that: a run that ends in between can be resumed, or begun again.
        """
        self.store.abort_unfinished()
        listing = self._listing()
        if self.mark not in listing:
            self._send(mark)
        stays = {self.mark, *(self._sent(mark.parent) if again else ())}
        files = [name for name, entry in listing.items() if entry is not None and name not in stays]
        first = [name for name in reversed(LAST) if name in files]
        for names in (first, [name for name in files if name not in first]):
            patiently(lambda names=names: self.store.remove(names), self.store.address)

    def publish(self, files: list[Path]) -> None:
        """Send what is left in OUT.partial, and last what makes it a checkpoint. DersError if another run wrote there."""
        sent = self._sent(files[0].parent)
        for path in sorted(files, key=lambda path: LAST.index(path.name) if path.name in LAST else -1):
            if path.name in LAST:
                self._compare(sent)
            sent[path.name] = self._send(path)
        patiently(lambda: self.store.remove([self.mark]), self.store.address)

    def size(self) -> int:
        """Bytes of all files that stand there."""
        return sum(entry.size for entry in self._listing().values() if entry is not None)

    def _send(self, path: Path) -> Entry:
        return patiently(lambda: self.store.put(path, path.name), f"{self.store.where(path.name)}: sending it")

    def _note(self, path: Path) -> Path:
        return path.with_name(f"{self.mark}.{path.name}")

    def _sent(self, folder: Path) -> dict[str, Entry]:
        """The weight files that were sent from OUT.partial, by their notes."""
        notes = {note.name.removeprefix(f"{self.mark}."): _read_note(note) for note in folder.glob(f"{self.mark}.*")}
        return {name: entry for name, entry in notes.items() if entry is not None}

    def _compare(self, sent: dict[str, Entry]) -> None:
        """Raise DersError if a file that was sent is not there any more, or is not the one that was sent."""
        listing = self._listing()
        for name, entry in sent.items():
            if listing.get(name) != entry:
                raise DersError(
                    f"{self.store.where(name)}: {'gone' if name not in listing else 'replaced'} since it was sent; does "
                    "another run write there? --resume sends it again"
                )

    def _listing(self) -> dict[str, Entry | None]:
        return patiently(self.store.listing, self.store.address)


def _read_note(note: Path) -> Entry | None:
    """What a note says was sent; None if there is none, or one of another version of ders."""
    try:
        return Entry(*json.loads(note.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def open_target(location: str, mark: str, scratch: Path | None) -> tuple[Path, Target]:
    """A remote output: the local folder that stands for it until it is sent, and where it goes.

    The local folder is the same in every run to this address, for --resume; nobody else may enter it.
    """
    if not is_remote(location) or not location.lower().startswith(("s3://", "gs://")):
        hint = (
            "; write it to a folder, then `hf upload ORGANISATION/MODEL FOLDER`" if location.startswith("hf:") else ""
        )
        raise UsageError(f"{normal(location)}: can be read, not written: -o takes a folder, s3://... or gs://...{hint}")
    store = open_store(location)
    if store.address.count("/") < 3:
        raise UsageError(f"{store.address}: is a whole bucket; expected a folder in it, {store.address}/folder")
    key = hashlib.sha256(store.address.encode()).hexdigest()[:16]
    top = (scratch or Path(tempfile.gettempdir())) / f"ders-to-{store.name}-{key}"
    return top / store.name, Upload(store, mark, top)
