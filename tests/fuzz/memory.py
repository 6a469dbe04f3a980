"""A DeRS checkpoint of one group, in memory: a line of JSON says what ders.json would, the stored bytes follow it.

    {"shape": [out, in], "dtype": "BF16", "codec": {...}, "members": 2, "seed": 0, "base": 5}\\n
    the parts' bytes, in the order of the codec's spec (missing ones are zeros); a stream takes what is left

`base` seeds the base's random bits (0: all of it zeros). All checks are those that a folder meets on its way: the schema
of ders.json, the constructor of DersSource, and every read by position, here from arrays.
"""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import independent_reader as page
import numpy as np
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats
from fuzz import mutations

from ders_cli import source
from ders_cli.checkpoint.manifest_schema import check_manifest
from ders_cli.checkpoint.reader import CheckpointReader, Place
from ders_cli.checkpoint.tensor import STORAGE, TensorSpec
from ders_cli.codecs import codec_from_config, exact
from ders_cli.errors import DersError

LARGEST = 1 << 13  # bytes of a tensor; a declared one that is larger is not in the file
CHUNK, BLOCK = 96, 64  # weights: small matrices have several chunks and blocks too
GROUP = "model.layers.0.mlp.experts.up_proj"


class MemoryReader(CheckpointReader):
    """Tensors from a dictionary of bytes; reading outside of one is a fault of ders."""

    def __init__(self, tensors: dict[str, TensorSpec], data: dict[str, bytes]):
        self.folder, self.address, self.config, self.index = Path("memory"), "memory", {}, {}
        self.files, self.headers, self.tensors, self._data = ["model.safetensors"], {}, tensors, data
        self.places = {name: Place("model.safetensors", 0) for name in tensors}

    def read_bytes(self, name: str, begin: int, out: np.ndarray) -> None:
        view, data = out.reshape(-1).view(np.uint8), self._data[name]
        assert 0 <= begin and begin + view.size <= len(data), (
            f"{name}: read {begin}..{begin + view.size} of {len(data)}"
        )
        view[:] = np.frombuffer(data, np.uint8, view.size, begin)

    def close(self) -> None:
        """Nothing is open."""


def decode(data: bytes) -> None:
    """Open and decode everything, twice and in two ways. Raises a DersError, or AssertionError where ders is wrong."""
    head, _, stored = data.partition(b"\n")
    try:
        head = json.loads(head)
        shape, dtype, config = head["shape"], head["dtype"], head["codec"]
        members, seed, base = min(4, int(head["members"])), head["seed"], int(head["base"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return  # a codec's input is what follows; the manifest's own target is another
    manifest = _manifest(shape, dtype, config, members, seed)
    with (
        mock.patch.object(exact, "CHUNK_WEIGHTS", CHUNK),
        mock.patch.object(source, "BLOCK_WEIGHTS", BLOCK),
        mock.patch.object(source, "read_manifest", lambda folder: check_manifest("ders.json", manifest) or manifest),
    ):
        _decode_all(source.DersSource(_reader(manifest, base, stored)))


def _manifest(shape: Any, dtype: Any, codec: Any, members: int, seed: Any) -> dict[str, Any]:
    whole = {"offset": 0, "strides": [1, 1], "source_hash": "0" * 64, "restored_hash": "0" * 64, "error": {}}
    listed = [{"label": str(i), "tensor": f"w{i}"} | whole for i in range(members)]
    group = {"name": GROUP, "layer": 0, "projection": "up", "shape": shape, "dtype": dtype, "codec": codec}
    form = {"layout": "x", "activation": "silu", "aliases": {}, "config": "{}", "files": {}, "index": None}
    return {
        "format": 1,
        "tool": "x",
        "recipe": {"base": "mean", "seed": seed, "shared": False},
        "source": form,
        "groups": [group | {"members": listed}],
        "guards": [],
        "tensors": {},
        "files": {},
        "bytes": {},
        "checksum": "",
    }


def _reader(manifest: dict[str, Any], base: int, stored: bytes) -> MemoryReader:
    """The tensors that a file would need, as far as a small one can have them."""
    check_manifest("ders.json", manifest)
    groups, codecs = source._groups_of(manifest)
    tensors, data, at = {}, {}, 0
    for name, spec in source.stored_parts(groups[0], codecs[groups[0].name]).items():
        if spec is None:
            spec = TensorSpec((max(0, len(stored) - at),), "U8")
        if spec.nbytes > LARGEST:
            spec = TensorSpec((0,), "U8")
        if name.endswith(".base"):
            data[name] = _base_bits(spec, base).tobytes()
        else:
            data[name], at = stored[at : at + spec.nbytes].ljust(spec.nbytes, b"\0"), at + spec.nbytes
        tensors[name] = spec
        slices = 1 if name.endswith((".base", ".stream")) else len(groups[0].members)
        manifest["tensors"][name] = ["0" * 64] * slices
    return MemoryReader(tensors, data)


def _base_bits(spec: TensorSpec, seed: int) -> np.ndarray:
    storage = STORAGE[spec.dtype]
    if not seed:
        return np.zeros(spec.shape, storage)
    return np.random.default_rng(abs(seed)).integers(0, 1 << 8 * storage.itemsize, spec.shape).astype(storage)


def _decode_all(opened: source.DersSource) -> None:
    (group,) = opened.groups
    blocks = list(opened.blocks(group))
    for member in range(len(group.members)):
        first, again = ([_decoded(opened, group, member, rows) for rows in blocks] for _ in range(2))
        assert [_bits(a) for a in first] == [_bits(b) for b in again], "decoding again gives something else"
        if len(blocks) > 1 and not opened.codecs[group.name].lossless:
            whole = _decoded(opened, group, member, slice(0, group.shape[0]))
            if isinstance(whole, np.ndarray) and all(isinstance(part, np.ndarray) for part in first):
                assert _bits(np.concatenate(first)) == _bits(whole), "blocks give something else than the whole"
            else:
                assert not all(isinstance(part, np.ndarray) for part in (whole, *first)), "only some blocks decode"
        refused = [part for part in first if not isinstance(part, np.ndarray)]
        if refused:
            raise refused[0]
        assert np.concatenate(first).tobytes() == _by_the_page(opened, group, member), "docs/format.md says otherwise"


def _by_the_page(opened: source.DersSource, group: Any, member: int) -> bytes:
    """What independent_reader.py makes of the same bytes."""
    config, base = opened.entry(group)["codec"], opened.reader.read(f"{group.name}.base")
    parts = {name.rpartition(".delta.")[2]: opened.reader.read(name) for name in opened.tensors_of(group)[1:]}
    if opened.codecs[group.name].lossless:
        extents, step = parts["extents"][member].tolist(), exact.ExactCodec().block_rows(group.shape)
        rows = [base[first : first + step].reshape(-1) for first in range(0, len(base), step)]
        chunks = [parts["stream"][begin:end].tobytes() for begin, end in extents]
        return b"".join(
            page.read_chunk(chunk, own, group.dtype).tobytes() for chunk, own in zip(chunks, rows, strict=True)
        )
    own = {part: page.read_part(config, part, stored[member]) for part, stored in parts.items()}
    key = make_key(opened.seed, group.name, group.members[member][0])
    with np.errstate(all="ignore"):
        weights = page.widen(base, group.dtype) + page.read_delta(config, own, base.shape, key)
        return np.where(np.isnan(weights), 0, page.narrow(weights, group.dtype)).astype(base.dtype).tobytes()


def _decoded(opened: source.DersSource, group: Any, member: int, rows: slice) -> np.ndarray | DersError:
    base = opened.read_base(group, rows)
    before = base.tobytes()
    try:
        bits = opened.decode(group, member, rows, base)
    except DersError as error:
        return error
    assert (bits.shape, bits.dtype) == (base.shape, base.dtype), f"{bits.dtype} {bits.shape}"
    assert base.tobytes() == before, "the base was written to"
    if not opened.codecs[group.name].lossless:
        # which of two NaNs a sum takes its bits from is the processor's affair, and other in a vector's lanes than behind them
        bits[np.isnan(floats.widen(bits, group.dtype))] = 0
    return bits


def _bits(result: np.ndarray | DersError) -> bytes | str:
    return result.tobytes() if isinstance(result, np.ndarray) else str(result)


def example(config: dict[str, Any], shape: tuple[int, int], dtype: str, seed: int = 0, far: int = 0) -> bytes:
    """A valid input: two experts, coded by the codec itself. `far` is for `exact`: near their base, any numbers, any bits."""
    rng, codec = np.random.default_rng(seed), codec_from_config(config)
    lossless = codec.lossless
    bits = _base_bits(TensorSpec(shape, dtype), int(lossless))  # of a random base's NaNs no other codec makes anything
    coded: dict[str, list[np.ndarray]] = {"extents": []} if lossless else {}
    end = 0
    with mock.patch.object(exact, "CHUNK_WEIGHTS", CHUNK):
        for member in range(2):
            expert = _expert(bits, dtype, rng, far if lossless else 1)
            step = codec.block_rows(shape) if lossless else shape[0]
            for first in range(0, shape[0], step):
                rows, key = slice(first, first + step), make_key(seed, GROUP, str(member))
                for part, array in codec.encode_expert(expert[rows], bits[rows], dtype, key, first).items():
                    coded.setdefault(part, []).append(array)
                if lossless:
                    begin, end = end, end + coded["stream"][-1].size
                    coded["extents"].append(np.array([begin, end], "<i8"))
    head = {"shape": list(shape), "dtype": dtype, "codec": config, "members": 2, "seed": seed, "base": int(lossless)}
    stored = b"".join(array.tobytes() for part in codec.spec(shape) for array in coded[part])
    return mutations.dump(head) + b"\n" + stored


def _expert(base: np.ndarray, dtype: str, rng: np.random.Generator, far: int) -> np.ndarray:
    """Stored bits; a row that is the base's own among them."""
    kind, one = base.dtype, {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}[dtype]
    if far == 2:
        return rng.integers(0, 1 << 8 * kind.itemsize, base.shape).astype(kind)
    expert = base ^ rng.integers(0, 16, base.shape).astype(kind)
    if far == 1:
        expert = (one + rng.integers(-99, 99, base.shape)).astype(kind)
        expert |= (rng.integers(0, 2, base.shape) << (8 * kind.itemsize - 1)).astype(kind)
    expert[-1:] = base[-1:] if len(base) > 1 else expert[-1:]
    return expert
