"""Reading a safetensors checkpoint: headers first, checked as hostile input; then slices by position.

A checkpoint is a folder with one `*.safetensors`, or several and `model.safetensors.index.json`. Opening reads
headers only. Data are read by pread into memory that the caller sizes: never mmap, whose pages count as memory.

The file format (https://github.com/huggingface/safetensors, "Format"): u64 header length N, N bytes of JSON
{name: {dtype, shape, data_offsets: [begin, end]}}, then the tensors' bytes without holes.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from reprlib import repr  # of a stranger's value, which may be large: only its beginning is made
from typing import Any

import numpy as np
from blake3 import blake3

from ..errors import CheckpointError, DersError, UnsupportedError, UsageError
from .files import Stamp, named, open_regular, read_at, read_small
from .json_text import parse_json, refuse_depth
from .links import refuse_stray_links
from .tensor import BITS, STORAGE, TensorSpec

CONFIG, INDEX, MANIFEST = "config.json", "model.safetensors.index.json", "ders.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors' own reader
MAX_JSON_BYTES = 256_000_000  # ders.json, the index; all headers of a checkpoint together, which ders.json repeats
MAX_CONFIG_BYTES = 16_000_000
MAX_NAME = 1000  # letters of a tensor's name; real ones have up to 100
NOT_FINITE = (
    "NaN",
    "Infinity",
    "-Infinity",
)  # in config.json, as Mamba's time_step_limit; Python writes and reads them

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


def read_json(path: Path, what: str, most: int = MAX_JSON_BYTES, constants: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; CheckpointError if it is anything else. `constants`: see parse_json."""
    return object_in(read_small(path, most, what)[0], path, what, constants)


def object_in(text: bytes, path: Path, what: str, constants: tuple[str, ...] = ()) -> dict[str, Any]:
    """The JSON object that a file's text holds. Raises CheckpointError."""
    try:
        found = parse_json(text, constants)
        refuse_depth(found)
        return found
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise CheckpointError(f"{path}: expected {what} as JSON: {error}") from None


def read_header(path: Path) -> Header:
    """Parse and check one file's header: contiguous, complete, of known dtypes. CheckpointError names the tensor."""
    handle, stamp = open_regular(path, "a safetensors file")
    try:
        return header_of(handle, path, stamp.size)
    finally:
        os.close(handle)


def header_of(handle: int, path: Path, size: int) -> Header:
    """The header of an open file of `size` bytes, checked. Raises CheckpointError."""
    length = int.from_bytes(read_at(handle, path, 0, 8), "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"{path}: header of {length} bytes announced in a file of {size}; truncated or not safetensors"
        )
    text = read_at(handle, path, 8, length)
    header, data_bytes = parse_header(text, path)
    if 8 + length + data_bytes != size:
        raise CheckpointError(f"{path}: expected {8 + length + data_bytes} bytes, found {size}. Is the file complete?")
    return header


def parse_header(text: bytes, path: Path) -> tuple[Header, int]:
    """A header from its text, and how many bytes its tensors take. Raises CheckpointError."""
    try:
        entries = parse_json(text)
        if not text.startswith(b"{"):
            raise ValueError("expected it to begin with {")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not JSON: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__: expected strings")
    tensors, ends = {}, {}
    for name, entry in entries.items():
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{path}: a tensor's name of {len(name)} letters; expected at most {MAX_NAME}")
        tensors[name], ends[name] = _check_entry(f"{path.name}: {name}", entry)
    order = sorted(tensors, key=lambda name: ends[name])
    position = 0
    for name in order:
        begin, end = ends[name]
        if begin != position:
            raise CheckpointError(f"{path}: {name}: begins at {begin}, expected {position} (a hole or an overlap)")
        position = end
    data = 8 + len(text)
    in_order = {name: tensors[name] for name in order}
    return Header(in_order, {name: data + ends[name][0] for name in order}, metadata, text), position


def _check_entry(where: str, entry: Any) -> tuple[TensorSpec, tuple[int, int]]:
    """One header entry -> its spec and (begin, end), or CheckpointError."""

    def naturals(key: str) -> list[int]:
        numbers = entry.get(key)
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointError(f"{where}: {key}: expected whole numbers, found {repr(numbers):.80}")
        return numbers

    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected an object, found {repr(entry):.80}")
    shape, offsets, dtype = naturals("shape"), naturals("data_offsets"), entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {repr(dtype):.40}")
    if len(offsets) != 2:
        raise CheckpointError(f"{where}: data_offsets: expected [begin, end], found {offsets!r:.80}")
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise CheckpointError(
            f"{where}: {dtype} {shape!r:.200} takes {bits // 8} bytes, data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorSpec(tuple(shape), dtype), (offsets[0], offsets[1])


def is_weight_file(name: str) -> bool:
    """Whether a stranger's name for a weight file can be one in a folder of ours: no way out of it, nothing hidden."""
    plain = PurePath(name).name == name and "\\" not in name and name.isprintable() and len(name.encode()) < 200
    return plain and name.endswith(".safetensors") and not name.startswith(".")


def _index_of(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The whole index, and its weight_map: names of tensors and of files in this folder. Raises CheckpointError."""
    index = object_in(text, path, "the shard index")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: expected names and files")
    if not isinstance(index.get("metadata") or {}, dict):
        raise CheckpointError(f"{path}: metadata: expected keys and values, found {index['metadata']!r:.80}")
    known: set[str] = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and file in known:
            continue
        if not isinstance(file, str) or not is_weight_file(file):
            raise CheckpointError(f"{path}: {name}: expected a file name in this folder, found {file!r:.80}")
        known.add(file)
    return index, weight_map


def _listed_files(folder: Path, weight_map: dict[str, str] | None) -> list[str]:
    """The weight files: those of the index, or the only one that stands here."""
    loose = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if weight_map is None:
        if len(loose) > 1:
            raise CheckpointError(f"{folder}: {len(loose)} safetensors files but no {INDEX}; which are the model?")
        if not loose:
            raise UnsupportedError(
                f"{folder}: no *.safetensors; ders reads no pickles (.bin, .pt): save as safetensors"
            )
        return loose
    files = sorted(set(weight_map.values()))
    if "model.safetensors" in loose and "model.safetensors" not in files:
        raise CheckpointError(
            f"{folder}: model.safetensors stands beside {INDEX}, which does not list it; "
            "transformers would load it instead of the shards. Remove one of the two"
        )
    return files


class CheckpointReader:
    """A checkpoint opened by its headers. Safe to read from several threads; `close` it, or use `with`.

    A weight file is opened once, before its header is read. `check_unchanged` says whether all is still as it was then.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.address = str(self.folder)  # as the user knows it; of a remote checkpoint its URL
        if not self.folder.is_dir():
            raise UsageError(f"{folder}: no such folder")
        self._stamps: dict[str, Stamp] = {}  # file -> what it was before anything of it was read
        self._handles: dict[str, int] = {}  # of the weight files
        try:
            self._read_small_files()
            self._read_headers()
            present = [name for name in (CONFIG, INDEX, MANIFEST) if name in self._stamps]
            refuse_stray_links(self.folder, self.files, present)
        except BaseException:
            CheckpointReader.close(self)
            raise

    def _read_small_files(self) -> None:
        path = self.folder / CONFIG
        self.config_text, self._stamps[CONFIG] = read_small(path, MAX_CONFIG_BYTES, "the model's configuration")
        self.config: dict[str, Any] = object_in(self.config_text, path, "the model's configuration", NOT_FINITE)
        self.index: dict[str, Any] = {}
        self.index_text, weight_map = b"", None
        if os.path.lexists(path := self.folder / INDEX):
            self.index_text, self._stamps[INDEX] = read_small(path, MAX_JSON_BYTES, "the shard index")
            self.index, weight_map = _index_of(path, self.index_text)
        if os.path.lexists(path := self.folder / MANIFEST):  # read later, by who knows what it says (manifest.py)
            handle, self._stamps[MANIFEST] = open_regular(path, "the DeRS manifest")
            os.close(handle)
        self._weight_map = weight_map
        self.files = _listed_files(self.folder, weight_map)

    def _read_headers(self) -> None:
        self.headers: dict[str, Header] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.places: dict[str, Place] = {}
        read = 0
        for file in self.files:
            path = self.folder / file
            self._handles[file], self._stamps[file] = open_regular(path, "a safetensors file")
            self.headers[file] = header = header_of(self._handles[file], path, self._stamps[file].size)
            if (read := read + len(header.text)) > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{path}: headers up to this file have {read} bytes; expected at most {MAX_JSON_BYTES}"
                )
            for name, spec in header.tensors.items():
                if name in self.tensors:
                    raise CheckpointError(f"{name}: stands in {self.places[name].file} and in {file}; expected once")
                self.tensors[name] = spec
                self.places[name] = Place(file, header.begins[name])
        if self._weight_map is not None:
            self._check_index(self._weight_map)
        del self._weight_map
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._large = sum(spec.nbytes for spec in self.tensors.values()) > memory / 2

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the files anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises DersError if a file is not the one whose header came along; another node may number its files otherwise."""
        self.__dict__.update(state)
        self._handles, began, self._stamps = {}, self._stamps, dict(self._stamps)
        try:
            for file, stamp in began.items():
                handle, self._stamps[file] = open_regular(self.folder / file, "the file that was opened elsewhere")
                if file in self.files:
                    self._handles[file] = handle
                else:
                    os.close(handle)
                if what := stamp.difference(self._stamps[file], same_node=False):
                    raise _mixture(self.folder / file, what)
        except BaseException:
            CheckpointReader.close(self)
            raise

    def check_unchanged(self) -> None:
        """Raise DersError if a file of the checkpoint is not what it was when it was opened. Costs a few system calls a file."""
        for file, stamp in self._stamps.items():
            path = self.folder / file
            try:
                now = Stamp.of(path.stat())
            except FileNotFoundError:
                raise _mixture(path, "vanished") from None
            # an open file keeps its inode; of another one, some file systems (FUSE) give a new number at each look
            if what := stamp.difference(now, same_node=file in self._handles):
                raise _mixture(path, what)

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
            try:
                got = os.preadv(self._handles[place.file], [view], at)
            except OSError as error:
                raise named(error, self.folder / place.file) from None
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


def _mixture(path: Path, what: str) -> DersError:
    return DersError(
        f"{path}: {what} since it was opened, so the output would be of a mixture; run again (--overwrite) when the source "
        "stands still"
    )


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
