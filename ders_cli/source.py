"""Where experts are read from: a plain MoE checkpoint, or a DeRS one that synthesises them as they are asked for.

Both give the same groups and the same bits, so converting, restoring and verifying need not know which it is.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ders_kernels.counter_rng import make_key

from .checkpoint.manifest import index_text, is_ders, read_manifest
from .checkpoint.reader import CheckpointReader, read_view
from .checkpoint.tensor import STORAGE, TensorSpec
from .checkpoint.writer import header_text
from .codecs import DeltaCodec, group_codec_from_config
from .codecs.base import Parts
from .codecs.mixed import Family, GroupCodec, families, family_of
from .errors import CheckpointError
from .layouts import ExpertGroup, MatrixView, find_layout
from .remote.reader import open_reader
from .users import Users

# Rows are handled in blocks of about this many weights of one expert: 1 MB of fp32, which a core's cache holds.
BLOCK_WEIGHTS = 1 << 18


class Source(ABC):
    """A checkpoint as groups of experts and tensors that are copied."""

    reader: CheckpointReader
    folders: list[Path]  # everything that is read; an output may not replace it
    config: dict[str, Any]
    groups: tuple[ExpertGroup, ...]
    guards: tuple[str, ...]  # one name per MoE layer at which stock loaders look for the experts
    copied: dict[str, TensorSpec]  # tensors that are no experts, natural order of the file
    aliases: dict[str, str]  # their canonical names, where these differ
    activation: str
    shared: bool  # a shared expert is in the groups
    _users: Users
    upcycling: dict[str, Any] | None = None  # how a dense model was made this MoE; ders.json keeps it
    aligned: tuple[str, ...] = ()  # copied tensors that say in which order experts' neurons stand (aligned.py)

    @abstractmethod
    def read(self, group: ExpertGroup, member: int, rows: slice) -> np.ndarray:
        """Stored bits [rows, in] of one expert."""

    def read_experts(self, group: ExpertGroup, members: Iterable[int], rows: slice) -> Iterator[np.ndarray]:
        """The same rows of several experts, one after another."""
        return (self.read(group, member, rows) for member in members)

    @abstractmethod
    def form(self) -> dict[str, Any]:
        """The plain checkpoint's own form, down to its header bytes: `source` in ders.json (docs/format.md, section 6)."""

    @abstractmethod
    def tensors_of(self, group: ExpertGroup) -> list[str]:
        """The reader's tensors that hold a group."""

    def position(self, names: Iterable[str]) -> tuple[str, int]:
        """Where the first of some of the reader's tensors stands: work in this order reads files from front to back."""
        places = [self.reader.places[name] for name in names if name in self.reader.places]
        return min(((place.file, place.begin) for place in places), default=("", 0))

    def done(self, group: ExpertGroup, members: Iterable[int]) -> None:
        """Some experts of the group will not be read again in this run; with the last of them its tensors are let go."""
        for name in self._users.done(group, members):
            self.reader.done(name)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """Bytes of a copied tensor, from front to back, in pieces."""
        return self.reader.chunks(name)

    def codec_of(self, group: ExpertGroup) -> DeltaCodec | None:
        """The codec that this source needs for a group; None: the recipe decides."""
        return None

    def given(self, group: ExpertGroup, member: int, codec: DeltaCodec, key: int) -> Parts | None:
        """Parts that stand for an expert from the start, so that no delta has to be encoded; None: encode it."""
        return None

    def chunk_rows(self, group: ExpertGroup) -> int | None:
        """Rows that are decoded together: blocks of multiples of it are read well. None: any are."""
        return None

    def blocks(self, group: ExpertGroup) -> Iterator[slice]:
        """Row blocks in which this source reads a group well."""
        return row_blocks(group.shape, self.chunk_rows(group) or max(1, BLOCK_WEIGHTS // max(1, group.shape[1])))

    def check_unchanged(self) -> None:
        """Raise DersError if a file that is read is not what it was when it was opened."""
        self.reader.check_unchanged()

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def row_blocks(shape: tuple[int, int], step: int) -> Iterator[slice]:
    """0..out in steps."""
    for begin in range(0, shape[0], step):
        yield slice(begin, min(shape[0], begin + step))


class PlainSource(Source):
    """Experts as the file keeps them."""

    def __init__(self, checkpoint: Path | CheckpointReader, shared: bool = False):
        self.reader = checkpoint if isinstance(checkpoint, CheckpointReader) else CheckpointReader(checkpoint)
        self.folders = [self.reader.folder]
        try:
            layout = find_layout(self.reader.tensors, self.reader.config, include_shared=shared)
        except BaseException:
            self.reader.close()
            raise
        self.layout, self.groups, self.activation, self.shared = layout, layout.groups, layout.activation, shared
        self.config, self.guards = self.reader.config, layout.guards
        experts = {view.tensor for group in self.groups for _, view in group.members}
        self.copied = {name: spec for name, spec in self.reader.tensors.items() if name not in experts}
        self.aliases = dict(layout.aliases)
        self._users = Users(self.groups, self.tensors_of)

    def read(self, group: ExpertGroup, member: int, rows: slice) -> np.ndarray:
        view = group.members[member][1]
        return read_view(self.reader, view.tensor, view.offset, (view.row_stride, view.column_stride), view.shape, rows)

    def tensors_of(self, group: ExpertGroup) -> list[str]:
        return list(dict.fromkeys(view.tensor for _, view in group.members))

    def form(self) -> dict[str, Any]:
        reader, files = self.reader, {}
        for file, header in reader.headers.items():
            listed = [[name, spec.dtype, list(spec.shape)] for name, spec in header.tensors.items()]
            files[file] = {"tensors": listed, "metadata": header.metadata}
            if header_text(header.tensors, header.metadata) != header.text:
                files[file]["header"] = header.text.decode()
        index = None
        if reader.index:
            metadata = reader.index.get("metadata") or {}
            text = reader.index_text
            index = {"metadata": metadata}
            if text != index_text({name: place.file for name, place in reader.places.items()}, metadata):
                index["text"] = text.decode()
        return {
            "layout": self.layout.name,
            "activation": self.activation,
            "aliases": self.aliases,
            "files": files,
            "index": index,
            "config": reader.config_text.decode(),
        }


class DersSource(Source):
    """Experts as base + delta, from a DeRS checkpoint."""

    def __init__(self, checkpoint: Path | CheckpointReader):
        self.reader = checkpoint if isinstance(checkpoint, CheckpointReader) else CheckpointReader(checkpoint)
        self.folders = [self.reader.folder]
        try:
            self.manifest = read_manifest(self.reader.folder)
            self.groups, self.codecs = _groups_of(self.manifest)
            self._entries = {entry["name"]: entry for entry in self.manifest["groups"]}
            self._noted: dict[str, dict[str, dict[str, Any]]] = {}  # group -> label -> its member's entry
            self._check_structure()
        except BaseException:
            self.reader.close()
            raise
        self.config = {key: value for key, value in self.reader.config.items() if key != "quantization_config"}
        self.activation, self.guards = self.manifest["source"]["activation"], tuple(self.manifest["guards"])
        own = {name for group in self.groups for name in self.part_specs(group)} | set(self.manifest["guards"])
        self.copied = {name: spec for name, spec in self.reader.tensors.items() if name not in own}
        self.aliases = self.manifest["source"]["aliases"]
        self._users = Users(self.groups, self.tensors_of)
        self.seed, self.shared = self.manifest["recipe"]["seed"], self.manifest["recipe"]["shared"]
        self.upcycling, self.aligned = self.manifest.get("upcycling"), tuple(self.manifest.get("aligned", ()))

    @property
    def lossless(self) -> bool:
        """It gives back the experts that it was made of: coded exactly, or trained or upcycled as base and deltas."""
        members = (member for entry in self.manifest["groups"] for member in entry["members"])
        return all(member["source_hash"] == member["restored_hash"] for member in members)

    def tensors_of(self, group: ExpertGroup) -> list[str]:
        return list(self.part_specs(group))

    def form(self) -> dict[str, Any]:
        return self.manifest["source"]

    def entry(self, group: ExpertGroup) -> dict[str, Any]:
        """What ders.json says of a group."""
        return self._entries[group.name]

    def noted(self, group: ExpertGroup, label: str) -> dict[str, Any]:
        """What ders.json says of one expert."""
        if group.name not in self._noted:
            self._noted[group.name] = {member["label"]: _with_errors(member) for member in self.entry(group)["members"]}
        return self._noted[group.name][label]

    def part_specs(self, group: ExpertGroup) -> dict[str, TensorSpec]:
        """Every tensor that stands for a group: its base and its parts; a stream's size is what the file says."""
        specs = stored_parts(group, self.codecs[group.name])
        for name in [name for name, spec in specs.items() if spec is None]:
            found = self.reader.tensors.get(name)
            specs[name] = TensorSpec((found.size,), "U8") if found else TensorSpec((0,), "U8")
        return specs

    @cached_property
    def slice_labels(self) -> dict[str, list[str]]:
        """{tensor that has a hash for each expert: the experts' labels}"""
        groups = ((group, self.codecs[group.name]) for group in self.groups)
        return {name: labels for group, codec in groups for name, labels in _sliced(group, codec).items()}

    def _check_structure(self) -> None:
        expected = {name: spec for group in self.groups for name, spec in self.part_specs(group).items()}
        for name, spec in expected.items():
            found = self.reader.tensors.get(name)
            if found is None:
                raise CheckpointError(
                    f"{name}: missing; ders.json says {spec.dtype} {list(spec.shape)}. Is the checkpoint complete?"
                )
            if found != spec:
                raise CheckpointError(
                    f"{name}: expected {spec.dtype} {list(spec.shape)} from ders.json, found {found.dtype} {list(found.shape)}"
                )
        for name in self.manifest["tensors"]:
            if name not in self.reader.tensors:
                raise CheckpointError(f"{name}: missing; ders.json lists it. Is the checkpoint complete?")
        for name in self.reader.tensors:
            if name not in self.manifest["tensors"]:
                raise CheckpointError(f"{name}: stands in {self.reader.places[name].file} but not in ders.json")
        for name, digests in self.manifest["tensors"].items():  # a wrong number would leave bytes that no hash covers
            if len(digests) != (expected_hashes := len(self.slice_labels.get(name, [""]))):
                raise CheckpointError(f"ders.json: {name}: {len(digests)} hashes, expected {expected_hashes}")

    def chunk_rows(self, group: ExpertGroup) -> int | None:
        codecs = [family.codec for family in families(self.codecs[group.name], len(group.members))]
        return next((codec.block_rows(group.shape) for codec in codecs if codec.lossless), None)

    def read_base(self, group: ExpertGroup, rows: slice) -> np.ndarray:
        return self.reader.read(f"{group.name}.base", rows)

    def read(self, group: ExpertGroup, member: int, rows: slice) -> np.ndarray:
        return self.decode(group, member, rows, self.read_base(group, rows))

    def read_experts(self, group: ExpertGroup, members: Iterable[int], rows: slice) -> Iterator[np.ndarray]:
        base = self.read_base(group, rows)
        return (self.decode(group, member, rows, base) for member in members)

    def decode(self, group: ExpertGroup, member: int, rows: slice, base: np.ndarray) -> np.ndarray:
        """Stored bits [rows, in] of one expert, given those of the base. Raises CheckpointError naming the expert."""
        codec, label = self.codecs[group.name], group.members[member][0]
        family, place = family_of(codec, len(group.members), member)
        key = make_key(self.seed, group.name, label)
        try:
            if family.codec.lossless:
                return self._lossless(group, family, place, rows, base, key)
            parts = self._parts(group, codec, member, rows)
            return family.codec.decode_expert(parts, base, group.dtype, key, rows.start)
        except CheckpointError as error:
            raise CheckpointError(f"{group.name}, expert {label}: {error}") from None

    def _lossless(
        self, group: ExpertGroup, family: Family, place: int, rows: slice, base: np.ndarray, key: int
    ) -> np.ndarray:
        """Rows of the chunks that they lie in; decoding a part of a chunk takes as long as the whole."""
        step, (out, _) = family.codec.block_rows(group.shape), group.shape
        whole = slice(rows.start // step * step, min(out, -(-rows.stop // step) * step))
        if whole != rows:
            base = self.read_base(group, whole)
        pieces = []
        for begin in range(whole.start, whole.stop, step):
            chunk = slice(begin, min(out, begin + step))
            parts = self._chunk(group, family, place, chunk)
            its_base = base[begin - whole.start : chunk.stop - whole.start]
            pieces.append(family.codec.decode_expert(parts, its_base, group.dtype, key, begin))
        bits = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return bits if whole == rows else bits[rows.start - whole.start : rows.stop - whole.start]

    def _parts(self, group: ExpertGroup, codec: GroupCodec, member: int, rows: slice) -> Parts:
        """One expert's parts for some rows, of a codec that is not lossless."""
        (family, place), parts = family_of(codec, len(group.members), member), {}
        for part, spec in family.codec.spec(group.shape).items():
            whole = part in family.codec.whole
            first, count = (0, spec.shape[0]) if whole else (rows.start, rows.stop - rows.start)
            parts[part] = self._read_part(group, family, part, spec, place, first, count)
        return parts

    def _chunk(self, group: ExpertGroup, family: Family, place: int, rows: slice) -> Parts:
        """The stream of one of a family's experts, cut to the chunk that the rows are."""
        extents = family.codec.spec(group.shape)["extents"]
        number = rows.start // family.codec.block_rows(group.shape)
        begin, end = (int(n) for n in self._read_part(group, family, "extents", extents, place, number, 1)[0])
        stream = f"{group.name}.{family.prefix}stream"
        if not 0 <= begin <= end <= self.reader.tensors[stream].nbytes:
            raise CheckpointError(
                f"extents {begin}..{end} lie outside a stream of {self.reader.tensors[stream].nbytes} bytes"
            )
        most = 1 + TensorSpec((rows.stop - rows.start, group.shape[1]), group.dtype).nbytes  # kept as it is
        if end - begin > most:
            raise CheckpointError(f"extents {begin}..{end}: {end - begin} bytes; a chunk takes at most {most}")
        return {"stream": self.reader.read(stream, slice(begin, end))}

    def _read_part(
        self, group: ExpertGroup, family: Family, part: str, spec: TensorSpec, place: int, first: int, count: int
    ) -> np.ndarray:
        """Rows of one expert's slice of a part, whose leading two axes are taken as one."""
        flat = TensorSpec((len(family.members) * spec.shape[0], *spec.shape[1:]), spec.dtype)
        name = f"{group.name}.{family.prefix}{part}"
        return _read_flat(self.reader, name, flat, place * spec.shape[0] + first, count)


def _with_errors(member: dict[str, Any]) -> dict[str, Any]:
    """A member's entry; an error that JSON has no number for is infinite: relative to an expert of zeros."""
    return member | {"error": {name: math.inf if value is None else value for name, value in member["error"].items()}}


def _read_flat(reader: CheckpointReader, name: str, flat: TensorSpec, first: int, count: int) -> np.ndarray:
    """Rows of a tensor whose two leading axes are taken as one."""
    out = np.empty((count, *flat.shape[1:]), STORAGE[flat.dtype])
    reader.read_bytes(name, first * (flat.nbytes // max(1, flat.shape[0])), out)
    return out


def stored_parts(group: ExpertGroup, codec: GroupCodec) -> dict[str, TensorSpec | None]:
    """Names and specs on disk of what stands for a group; None: as long as its encoding turns out."""
    parts: dict[str, TensorSpec | None] = {f"{group.name}.base": TensorSpec(group.shape, group.dtype)}
    for family in families(codec, len(group.members)):
        for part, spec in family.codec.spec(group.shape).items():
            on_disk = spec and TensorSpec((len(family.members), *spec.shape), spec.dtype)
            parts[f"{group.name}.{family.prefix}{part}"] = on_disk
    return parts


def _sliced(group: ExpertGroup, codec: GroupCodec) -> dict[str, list[str]]:
    """The tensors of a group that have a hash for each expert, and the labels of these (docs/format.md, section 6)."""
    return {
        f"{group.name}.{family.prefix}{part}": [group.members[member][0] for member in family.members]
        for family in families(codec, len(group.members))
        for part, spec in family.codec.spec(group.shape).items()
        if spec is not None
    }


def _groups_of(manifest: dict[str, Any]) -> tuple[tuple[ExpertGroup, ...], dict[str, GroupCodec]]:
    """Groups and codecs as ders.json lists them."""
    groups, codecs = [], {}
    try:
        for entry in manifest["groups"]:
            name = entry["name"]
            shape = (int(entry["shape"][0]), int(entry["shape"][1]))
            members = tuple(
                (m["label"], MatrixView(m["tensor"], shape, m["offset"], m["strides"][0], m["strides"][1]))
                for m in entry["members"]
            )
            groups.append(ExpertGroup(name, entry["layer"], entry["projection"], entry["dtype"], members))
            codecs[name] = group_codec_from_config(entry["codec"], len(members))
        return tuple(groups), codecs
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"ders.json: groups are not as docs/format.md says: {error!r:.120}") from None


def open_source(location: str | Path, shared: bool = False, scratch: Path | None = None) -> Source:
    """A DeRS checkpoint if ders.json is there, otherwise a plain MoE. `scratch`: for what is fetched of it."""
    reader = open_reader(location, scratch)
    return DersSource(reader) if is_ders(reader.folder) else PlainSource(reader, shared)
