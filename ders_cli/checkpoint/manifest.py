"""ders.json and the index: what a DeRS checkpoint says about itself (docs/format.md).

Hashes are BLAKE3: of every tensor written (integrity), of every expert as it came (`source_hash`) and as it decodes
(`restored_hash`). Experts are hashed as [out, in] matrices in row order, little-endian, whatever the file's own
layout, so the same expert has the same hash in any form of the checkpoint. `checksum` covers ders.json itself.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .files import of_file
from .reader import MANIFEST, read_json

FORMAT = 1
PAGE = 4096


def file_names(count: int) -> list[str]:
    """Names of the weight files, in Hugging Face's manner."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its `checksum`, as compact JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_text(manifest: Mapping[str, Any], at_least: int = 0) -> bytes:
    """ders.json's bytes, padded with spaces to `at_least` bytes, so that a plan can state the size beforehand."""
    whole = dict(manifest) | {"checksum": checksum(manifest)}
    text = bytearray()
    for piece in _indented(whole):
        text += piece.encode()
    return bytes(text + b" " * (at_least - len(text) - 1) + b"\n")


def _indented(value: Any, depth: int = 0) -> Iterator[str]:
    """json.dumps(value, indent=1, sort_keys=True) in pieces: at once it would hold every number and bracket as an object."""
    if not value or depth == 2 or not isinstance(value, (dict, list)):
        yield json.dumps(value, indent=1, sort_keys=True).replace("\n", "\n" + " " * depth)
        return
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    for number, item in enumerate(sorted(value) if isinstance(value, dict) else value):
        yield (",\n" if number else f"{opening}\n") + " " * (depth + 1)
        if isinstance(value, dict):
            yield f"{json.dumps(item)}: "
            item = value[item]
        yield from _indented(item, depth + 1)
    yield "\n" + " " * depth + closing


def planned_bytes(placeholder: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> int:
    """Room for a manifest whose numbers and hashes are not known yet: its widest form, to the next page.

    `placeholder` is all of it but its `groups`, which come one by one: those of 70,000 experts fill 100 MB at once.
    """
    whole = dict(placeholder) | {"groups": [], "checksum": "0" * 64}
    sizes = [text_bytes(group, 2) for group in groups]
    # before each ",\n" and two spaces, no comma before the first; "\n " in the end
    listed = sum(sizes) + 4 * len(sizes) + 1 if sizes else 0
    return -(-(text_bytes(whole) + listed + 1) // PAGE) * PAGE


def text_bytes(value: Any, depth: int = 0) -> int:
    """len(json.dumps(value, indent=1)), of a value that stands in `depth` others, the text itself not made.

    Compact JSON is made in C, ten times as fast as indented, and what indenting adds can be counted.
    """
    if isinstance(value, dict) and value and depth < 2:  # piece by piece: the text of the whole would take memory
        pieces = sum(len(json.dumps(key)) + 2 + text_bytes(item, depth + 1) for key, item in value.items())
        return pieces + len(value) + 1 + _added(value, depth)
    return len(json.dumps(value, separators=(",", ": "))) + _indents(value, depth)


def _added(value: Any, depth: int) -> int:
    """A line end and depth + 1 spaces before each item, a line end and depth spaces before the closing bracket."""
    return len(value) * (depth + 2) + depth + 1


def _indents(value: Any, depth: int) -> int:
    """What indenting adds to compact JSON, in bytes."""
    if not value or not isinstance(value, (dict, list, tuple)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return _added(value, depth) + sum(
        _indents(item, depth + 1) for item in inner if type(item) not in (str, int, float)
    )


def index_text(weight_map: Mapping[str, str], metadata: Mapping[str, Any]) -> bytes:
    """The shard index, as transformers writes it."""
    return (
        json.dumps({"metadata": dict(metadata), "weight_map": dict(weight_map)}, indent=2, sort_keys=True) + "\n"
    ).encode()


def write_file(path: Path, data: bytes) -> None:
    """Write, fsync, then take the final name."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # of two attempts at one file, each its own
    with of_file(partial), partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.replace(partial, path)
    except OSError:  # a folder has the name
        partial.unlink()
        raise


def is_ders(folder: Path) -> bool:
    """Whether ders.json stands there; whatever it is, the folder is no plain checkpoint."""
    try:
        os.lstat(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """ders.json, its checksum and format version checked. Raises CheckpointError."""
    from .manifest_schema import check_manifest  # it takes pydantic, which writing does not

    # an expert of zeros has an infinite relative error, and Python writes that as Infinity
    manifest = read_json(folder / MANIFEST, "the DeRS manifest", constants=("Infinity", "-Infinity"))
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST}: format {manifest.get('format')!r:.20}; this ders reads format {FORMAT}"
        )
    if manifest.get("checksum") != checksum(manifest):
        raise CheckpointError(
            f"{folder / MANIFEST}: its checksum does not match its content; the file was changed or damaged"
        )
    check_manifest(str(folder / MANIFEST), manifest)
    return manifest
