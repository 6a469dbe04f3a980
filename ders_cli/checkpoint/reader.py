"""Reading a safetensors checkpoint: headers first, checked as hostile input; then slices by position.

A checkpoint is a folder with one `*.safetensors`, or several and `model.safetensors.index.json`. Opening reads
headers only. Data are read by pread into memory that the caller sizes: never mmap, whose pages count as memory.

The file format (https://github.com/huggingface/safetensors, "Format"): u64 header length N, N bytes of JSON
{name: {dtype, shape, data_offsets: [begin, end]}}, then the tensors' bytes without holes.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from ..errors import CheckpointError, UnsupportedError, UsageError
from .tensor import BITS, STORAGE, TensorSpec

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
MAX_JSON_BYTES = 256_000_000

# Weights in forms that ders does not read; they are left behind, and everything else beside the shards is carried along.
NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
LEFT_BEHIND = (*NOT_READ, ".safetensors", ".index.json", ".partial")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes stand: a file of the checkpoint and a byte position in it."""

    file: str
    begin: int


@dataclass(frozen=True)
class Header:
    """One safetensors file by its header: tensors in file order, and the header's own bytes."""

    tensors: dict[str, TensorSpec]
    begins: dict[str, int]  # absolute byte position of each tensor in the file
    metadata: dict[str, str]
    text: bytes


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return keys


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; CheckpointError if it is anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {what} of {path.stat().st_size} bytes; expected at most {MAX_JSON_BYTES}")
        found = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; expected {what}") from None
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CheckpointError(f"{path}: expected {what} as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_header(path: Path) -> Header:
    """Parse and check one file's header: contiguous, complete, of known dtypes. CheckpointError names the tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: header of {length} bytes announced in a file of {size}; truncated or not safetensors"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing. Is the checkpoint complete?") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: expected a file, found a folder") from None
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
        if not isinstance(entries, dict):
            raise ValueError(f"expected an object, found {type(entries).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not JSON: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: expected strings")
    tensors, ends = {}, {}
    for name, entry in entries.items():
        tensors[name], ends[name] = _check_entry(f"{path.name}: {name}", entry)
    order = sorted(tensors, key=lambda name: ends[name])
    position = 0
    for name in order:
        begin, end = ends[name]
        if begin != position:
            raise CheckpointError(f"{path}: {name}: begins at {begin}, expected {position} (a hole or an overlap)")
        position = end
    if 8 + length + position != size:
        raise CheckpointError(f"{path}: expected {8 + length + position} bytes, found {size}. Is the file complete?")
    return Header(
        {name: tensors[name] for name in order}, {name: 8 + length + ends[name][0] for name in order}, metadata, text
    )


def _check_entry(where: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    """One header entry -> its spec and (begin, end), or CheckpointError."""

    def naturals(key: str) -> list[int]:
        numbers = entry.get(key)
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointError(f"{where}: {key}: expected whole numbers, found {numbers!r:.80}")
        return numbers

    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected an object, found {entry!r:.80}")
    shape, offsets, dtype = naturals("shape"), naturals("data_offsets"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r:.40}")
    if len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets: expected [begin, end], found {offsets}")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise CheckpointError(
            f"{where}: {dtype} {shape} takes {bits // 8} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorSpec(tuple(shape), dtype), (offsets[0], offsets[1])


def _listed_files(folder: Path) -> tuple[list[str], dict[str, str] | None, dict[str, Any]]:
    """(file names, the index's weight_map or None, the whole index)."""
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if not (folder / INDEX).exists():
        if len(loose) > 1:
            raise CheckpointError(f"{folder}: {len(loose)} safetensors files but no {INDEX}; which are the model?")
        if not loose:
            raise UnsupportedError(
                f"{folder}: no *.safetensors; ders reads no pickles (.bin, .pt): save as safetensors"
            )
        return loose, None, {}
    index = read_json(folder / INDEX, "the shard index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: weight_map: expected names and files")
    known: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in known:
            continue
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{folder / INDEX}: {name}: expected a file name in this folder, found {file!r:.80}")
        known.add(file)
    files = sorted(known)
    if "model.safetensors" in loose and "model.safetensors" not in files:
        raise CheckpointError(
            f"{folder}: model.safetensors stands beside {INDEX}, which does not list it; "
            "transformers would load it instead of the shards. Remove one of the two"
        )
    return files, weight_map, index


class CheckpointReader:
    """A checkpoint opened by its headers. Safe to read from several threads; `close` it, or use `with`."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.address = str(self.folder)  # as the user knows it; of a remote checkpoint its URL
        if not self.folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        self.config: dict[str, Any] = read_json(self.folder / "config.json", "the model's configuration")
        self.files, weight_map, self.index = _listed_files(self.folder)
        self.headers = {file: read_header(self.folder / file) for file in self.files}
        self.tensors: dict[str, TensorSpec] = {}
        self.places: dict[str, Place] = {}
        for file, header in self.headers.items():
            for name, spec in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{name}: stands in {self.places[name].file} and in {file}; expected once")
                self.tensors[name] = spec
                self.places[name] = Place(file, header.begins[name])
        if weight_map is not None:
            self._check_index(weight_map)
        self._open()

    def _open(self) -> None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._large = sum(spec.nbytes for spec in self.tensors.values()) > memory / 2
        self._handles = {file: os.open(self.folder / file, os.O_RDONLY) for file in self.files}

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the files anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if name not in self.tensors:
                raise CheckpointError(f"{name}: missing; {INDEX} places it in {file}. Is {file} the right one?")
            if self.places[name].file != file:
                raise CheckpointError(f"{name}: {INDEX} places it in {file}, but it stands in {self.places[name].file}")
        extra = next((name for name in self.tensors if name not in weight_map), None)
        if extra is not None:
            raise CheckpointError(f"{extra}: stands in {self.places[extra].file} but not in {INDEX}")

    def read_bytes(self, name: str, begin: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, any dtype) with the tensor's bytes from byte `begin` on."""
        place, view = self.places[name], memoryview(out.reshape(-1).view(np.uint8))
        at = place.begin + begin
        while len(view):
            got = os.preadv(self._handles[place.file], [view], at)
            if got == 0:
                raise CheckpointError(f"{self.folder / place.file}: ends inside {name}; it shrank while being read")
            view, at = view[got:], at + got

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor's bits, or those of some rows of its first axis; BF16 and F16 as uint16, F32 as uint32."""
        spec = self.tensors[name]
        storage = STORAGE.get(spec.dtype)
        if storage is None:
            raise UnsupportedError(f"{name}: dtype {spec.dtype} is copied by ders, not read")
        start, stop, _ = (rows or slice(None)).indices(spec.shape[0] if spec.shape else 1)
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        out = np.empty(shape, storage)
        row_bytes = math.prod(spec.shape[1:]) * storage.itemsize
        self.read_bytes(name, start * row_bytes, out)
        return out

    def chunks(
        self, name: str, begin: int = 0, end: int | None = None, chunk_bytes: int = 4 << 20
    ) -> Iterator[np.ndarray]:
        """The tensor's bytes begin ... end from front to back, in one reused uint8 buffer."""
        end = self.tensors[name].nbytes if end is None else end
        buffer = np.empty(min(chunk_bytes, end - begin), np.uint8)
        for at in range(begin, end, chunk_bytes):
            part = buffer[: min(chunk_bytes, end - at)]
            self.read_bytes(name, at, part)
            yield part

    def hashes(self, name: str, slices: int = 1) -> list[str]:
        """BLAKE3 of the tensor's bytes, in equal slices of its first axis."""
        size, found = self.tensors[name].nbytes // slices, []
        for number in range(slices):
            digest = blake3()
            for chunk in self.chunks(name, number * size, (number + 1) * size):
                digest.update(chunk)
            found.append(digest.hexdigest())
        return found

    def expect(self, name: str) -> None:
        """The tensor will be read soon. For a local file the kernel's own read-ahead is better than any advice; a remote one
        is fetched."""

    def done(self, name: str) -> None:
        """The tensor, if it is one of this checkpoint, will not be read again. Where the checkpoint is larger than half
        of the memory, its pages are given back."""
        if self._large and name in self.places and hasattr(os, "posix_fadvise"):
            place, size = self.places[name], self.tensors[name].nbytes
            os.posix_fadvise(self._handles[place.file], place.begin, size, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles = {}

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_view(
    reader: CheckpointReader, tensor: str, offset: int, strides: tuple[int, int], shape: tuple[int, int], rows: slice
) -> np.ndarray:
    """Rows of a strided [out, in] matrix inside a tensor: element (r, c) at offset + r*strides[0] + c*strides[1].

    Contiguous rows cost one read, interleaved rows one read of twice the bytes, transposed matrices one read per
    input column.
    """
    storage = STORAGE[reader.tensors[tensor].dtype]
    start, stop, _ = rows.indices(shape[0])
    count, columns = stop - start, shape[1]
    row_stride, column_stride = strides
    if column_stride == 1:
        lines, step, width = count, row_stride, columns
        if row_stride == columns:
            out = np.empty((count, columns), storage)
            reader.read_bytes(tensor, (offset + start * row_stride) * storage.itemsize, out)
            return out
        span = np.empty((count - 1) * step + width if count else 0, storage)
        reader.read_bytes(tensor, (offset + start * row_stride) * storage.itemsize, span)
        index = np.arange(lines)[:, None] * step + np.arange(width)
        return span[index]
    out = np.empty((columns, count), storage)
    span = np.empty((count - 1) * row_stride + 1 if count else 0, storage)
    for column in range(columns):
        at = offset + start * row_stride + column * column_stride
        reader.read_bytes(tensor, at * storage.itemsize, span)
        out[column] = span[::row_stride]
    return np.ascontiguousarray(out.T)
