"""A remote checkpoint as a local folder: small files in full; of weight files the headers, in sparse files.

So everything that works on a folder works on a remote checkpoint: the checks of its headers and its index, what is
carried along, its fingerprint. The tensors' bytes come later (reader.py).
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event

from ..checkpoint.files import pwrite_all
from ..checkpoint.manifest import MANIFEST
from ..checkpoint.reader import INDEX, LEFT_BEHIND, MAX_HEADER_BYTES, MAX_JSON_BYTES, NOT_READ, read_json
from ..errors import CheckpointError, DersError, UnsupportedError, UsageError
from .store import Entry, Store, each, fetch, is_plain

MOST_SMALL = 512_000_000  # bytes of all files beside the weights
PIECE = 8 << 20  # bytes of one request; AT_ONCE (store.py) of them are in memory
READ = ("config.json", INDEX, MANIFEST)  # what else is fetched in full is carried along


def make_mirror(store: Store, listing: dict[str, Entry | None], folder: Path) -> int:
    """Fill an empty folder; the bytes that were fetched. Raises UsageError if there is no checkpoint at the address."""
    listing = {name: entry for name, entry in listing.items() if is_plain(name)}
    files = {name: entry for name, entry in listing.items() if entry is not None}
    if not files:
        raise UsageError(f"{store.address}: nothing there; expected a checkpoint's folder")
    small = {name: entry for name, entry in files.items() if name in READ or _is_carried(name)}
    _check_sizes(store, small)
    for name in listing.keys() - files.keys():
        (folder / name).mkdir()  # so that what is left behind can be named
    for name, entry in files.items():
        if name.endswith((".safetensors", *NOT_READ)):
            _lay_out(store, folder / name, entry)
    sizes = each(lambda name, stop: _whole(store, folder / name, small[name], stop), small)
    weights = [name for name in _weight_files(folder, files) if name in files]
    return sum(sizes) + sum(each(lambda name, stop: _header(store, folder / name, files[name], stop), weights))


def stamp(path: Path, entry: Entry) -> None:
    """Give a file a time made of its mark, so that the same remote file looks the same in every run."""
    digest = hashlib.sha256(f"{path.name} {entry.size} {entry.mark}".encode()).digest()
    time = int.from_bytes(digest[:7], "big") % (2**31 * 10**9)
    os.utime(path, ns=(time, time))


def _is_carried(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(LEFT_BEHIND)


def _check_sizes(store: Store, small: dict[str, Entry]) -> None:
    for name, entry in small.items():
        if name in READ and entry.size > MAX_JSON_BYTES:
            raise CheckpointError(f"{store.where(name)}: {entry.size} bytes; expected at most {MAX_JSON_BYTES}")
    if (total := sum(entry.size for entry in small.values())) > MOST_SMALL:
        largest = max(small, key=lambda name: small[name].size)
        raise UnsupportedError(
            f"{store.address}: the files beside its weights have {total} bytes ({largest}: {small[largest].size}); "
            f"expected at most {MOST_SMALL}. Download it first"
        )


def _weight_files(folder: Path, files: dict[str, Entry]) -> list[str]:
    """The files whose headers will be read: those in the index, or the only one. The reader says what is wrong."""
    if INDEX in files:
        found = read_json(folder / INDEX, "the shard index").get("weight_map")
        return sorted({file for file in found.values() if isinstance(file, str)}) if isinstance(found, dict) else []
    loose = [name for name in files if name.endswith(".safetensors")]
    return loose if len(loose) == 1 else []


def _lay_out(store: Store, path: Path, entry: Entry) -> None:
    """A file of the right size that takes no room."""
    with path.open("wb") as file:
        try:
            file.truncate(entry.size)
        except OSError as error:
            raise DersError(
                f"{path.parent}: cannot hold a sparse file of {entry.size} bytes for {store.where(path.name)} "
                f"({error.strerror}); --scratch names another folder"
            ) from None
    stamp(path, entry)


def _whole(store: Store, path: Path, entry: Entry, stop: Event) -> int:
    with path.open("wb") as file:
        for _, data in _pieces(store, path.name, 0, entry.size, entry, stop):
            file.write(data)
    stamp(path, entry)
    return entry.size


def _header(store: Store, path: Path, entry: Entry, stop: Event) -> int:
    """Fetch a weight file's header; one that cannot be right is left to the reader, which says so."""
    begin = fetch(store, path.name, 0, min(8, entry.size), entry, stop)
    fill(path, 0, begin, entry)
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or length > min(MAX_HEADER_BYTES, entry.size - 8):
        return len(begin)
    for at, data in _pieces(store, path.name, 8, 8 + length, entry, stop):
        fill(path, at, data, entry)
    return 8 + length


def _pieces(store: Store, name: str, begin: int, end: int, entry: Entry, stop: Event) -> Iterator[tuple[int, bytes]]:
    """Bytes begin ... end of a file, PIECE of them at a time, each with where it begins."""
    for at in range(begin, end, PIECE):
        yield at, fetch(store, name, at, min(at + PIECE, end), entry, stop)


def fill(path: Path, at: int, data: bytes, entry: Entry) -> None:
    """Write bytes into a sparse file, opened for it: a download that ends when the folder is gone does no harm."""
    handle = os.open(path, os.O_WRONLY)
    try:
        pwrite_all(handle, data, at)
    except OSError as error:
        raise DersError(f"{path.parent}: {error.strerror}; --scratch names another folder") from None
    finally:
        os.close(handle)
    stamp(path, entry)


def remove(folder: Path) -> None:
    """Take a mirror away, whatever state it is in."""
    shutil.rmtree(folder, ignore_errors=True)
