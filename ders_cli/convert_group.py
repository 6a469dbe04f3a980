"""One group of experts, block by block of rows: read, base, encode, write at its place, decode, measure.

This is where a conversion's time and memory go: the rows of all experts of one block (where they fit MEAN_BYTES), and
fp32 copies of one expert's rows.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from blake3 import blake3
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats

from .aligned import AlignedSource, original_place
from .base import MEAN_BYTES, Base, MeanBase
from .checkpoint.files import of_file
from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import ShardWriter
from .codecs import DeltaCodec
from .codecs.base import NonFiniteError, Parts
from .codecs.mixed import Family, families, family_of
from .describe import group_entry
from .differences import Differences
from .errors import CheckpointError
from .layouts import ExpertGroup
from .plan import Unit
from .report import Progress
from .source import BLOCK_WEIGHTS, DersSource, Source, row_blocks

ReadRows = Callable[[int, slice], np.ndarray]  # (expert, rows) -> stored bits


class Encoder(Protocol):
    """Another way to choose a codec's parts, such as by what a model's inputs are. They decode as any parts do."""

    label: dict[str, Any]  # what it is and from what, as JSON: `calibration` in ders.json

    def encode(
        self,
        group: ExpertGroup,
        member: int,
        codec: DeltaCodec,
        expert: np.ndarray,
        base: np.ndarray,
        key: int,
        row: int,
    ) -> Parts | None:
        """Stored bits [rows, in] of an expert and its base, from row `row` on -> parts; None: as the codec chooses them.

        The parts of some rows do not depend on the block that they came in. Raises NonFiniteError. Threads call it at once.
        """

    def block_rows(self, codec: DeltaCodec, shape: tuple[int, int]) -> int | None:
        """Rows that must come together where it chooses this codec's parts, or None: as the codec has it."""

    def memory(self, codec: DeltaCodec, group: ExpertGroup) -> int:
        """Bytes that `encode` takes at once, beside the rows that it is given."""

    def check_unchanged(self) -> None:
        """Raise DersError if a file that it reads is not what it was when it was opened."""


@dataclass
class _Expert:
    """One expert of a group: what stands for it, and what is known of it so far."""

    number: int  # in the group
    family: Family
    place: int  # in the family
    key: int
    came: blake3 = field(default_factory=blake3)  # of its bits
    restored: blake3 = field(default_factory=blake3)  # of the bits that its parts decode to
    differences: Differences = field(default_factory=Differences)


def convert_group(
    source: Source,
    base_of: Base | None,
    seed: int,
    unit: Unit,
    writer: ShardWriter,
    spools: Mapping[str, Path],
    progress: Progress,
    encoder: Encoder | None = None,
) -> dict[str, Any]:
    """Code one group into its places in `writer`, and each stream into its file of `spools`; its entry for ders.json.

    `base_of` is None where the source is a DeRS checkpoint that brings its own base. Raises CheckpointError.
    """
    group, experts = unit.group, _experts(unit, seed)
    streams = {name: spool.open("wb") for name, spool in spools.items()}
    for rows in row_blocks(group.shape, _common_rows(source, unit, encoder)):
        read = _held_reader(source, group, rows)
        base = _base_rows(source, base_of, group, rows, read)
        writer.write(f"{group.name}.base", rows.start * base[:1].nbytes, base)
        for family in families(unit.codec, len(group.members)):
            for expert, block in _steps(family, [experts[i] for i in family.members], rows, group, encoder):
                its_base = base[block.start - rows.start : block.stop - rows.start]
                bits, parts, coded = _coded(source, unit, expert, block, its_base, read, encoder)
                expert.came.update(bits.reshape(-1).view(np.uint8))
                if family.codec.lossless:
                    name = f"{group.name}.{family.prefix}stream"
                    _write_chunk(writer, unit, expert, block, parts.pop("stream"), streams[name], spools[name])
                else:
                    _write_parts(writer, unit, expert, block, parts)
                    expert.restored.update(coded.reshape(-1).view(np.uint8))
                    expert.differences.add(bits, coded, its_base, group.dtype)
                progress.advance(bits.nbytes)
        del read, base
    source.done(group, range(len(experts)))
    for name, stream in streams.items():
        with of_file(spools[name]):
            stream.close()
    return _entry(source, unit, experts)


def _experts(unit: Unit, seed: int) -> list[_Expert]:
    """The experts of a group, in its order."""
    made = []
    for number, (label, _) in enumerate(unit.group.members):
        family, place = family_of(unit.codec, len(unit.group.members), number)
        made.append(_Expert(number, family, place, make_key(seed, unit.group.name, label)))
    return made


def _coded(
    source: Source,
    unit: Unit,
    expert: _Expert,
    block: slice,
    base: np.ndarray,
    read: ReadRows,
    encoder: Encoder | None,
) -> tuple[np.ndarray, Parts, np.ndarray | None]:
    """An expert's bits [rows, in], its parts, and the bits that these decode to (None of a lossless codec)."""
    group, codec, key = unit.group, expert.family.codec, expert.key
    if (parts := source.given(group, expert.number, codec, key)) is not None:
        bits = codec.decode_expert(parts, base, group.dtype, key, block.start)
        return bits, parts, bits
    bits = read(expert.number, block)
    try:
        if encoder is not None:
            parts = encoder.encode(group, expert.number, codec, bits, base, key, block.start)
        if parts is None:
            parts = codec.encode_expert(bits, base, group.dtype, key, block.start)
    except NonFiniteError as error:
        raise _name_nonfinite(error, source, group, block, read) from None
    return bits, parts, None if codec.lossless else codec.decode_expert(parts, base, group.dtype, key, block.start)


def _entry(source: Source, unit: Unit, experts: list[_Expert]) -> dict[str, Any]:
    """The group's entry for ders.json. Raises CheckpointError where what was coded is no expert of this dtype."""
    group = unit.group
    for (label, _), expert in zip(group.members, experts, strict=True):
        if not expert.differences.finite:
            term = expert.family.codec.term
            raise CheckpointError(
                f"{group.name}, expert {label}: coded by {term} it passes the range of {group.dtype}; use exact"
            )
    found = [expert.came.hexdigest() for expert in experts]
    if isinstance(source, DersSource):
        _refuse_damaged(source, group, found)
    restored = [(e.came if e.family.codec.lossless else e.restored).hexdigest() for e in experts]
    return group_entry(unit, found, restored, [expert.differences.errors() for expert in experts])


def _refuse_damaged(source: DersSource, group: ExpertGroup, found: list[str]) -> None:
    """Raise CheckpointError where an expert did not decode to what its ders.json notes: it would be converted as it is."""
    for (label, _), digest in zip(group.members, found, strict=True):
        if digest != source.noted(group, label)["restored_hash"]:
            raise CheckpointError(
                f"{group.name}, expert {label}: does not decode to what was stored; {source.reader.address} is damaged "
                "(`ders verify` says where)"
            )


def _block_rows(group: ExpertGroup) -> int:
    """Rows of a block: about BLOCK_WEIGHTS of one expert, fewer where all experts' rows would not fit MEAN_BYTES."""
    row_bytes = TensorSpec((1, group.shape[1]), group.dtype).nbytes * len(group.members)
    return max(1, min(BLOCK_WEIGHTS // group.shape[1], MEAN_BYTES // row_bytes))


def _common_rows(source: Source, unit: Unit, encoder: Encoder | None) -> int:
    """Rows for which the base is made at once: whole blocks of every codec, and whole chunks of the source.

    An aligned source's chunks may be any rows: whole blocks of every codec, as many as one of them has.
    """
    codecs = [family.codec for family in families(unit.codec, len(unit.group.members))]
    chunk = source.chunk_rows(unit.group)
    known = [rows for codec in codecs if (rows := _together(codec, unit.group, encoder)) is not None]
    if chunk is not None and isinstance(source, AlignedSource):
        rows = math.lcm(*known)
        return max(rows, chunk // rows * rows)
    known += [chunk] if chunk is not None else []
    return math.lcm(*known) if known else _block_rows(unit.group)


def _together(codec: DeltaCodec, group: ExpertGroup, encoder: Encoder | None) -> int | None:
    """Rows that are coded together, None: any number."""
    wanted = encoder.block_rows(codec, group.shape) if encoder is not None else None
    return wanted or codec.block_rows(group.shape)


def _steps(
    family: Family, experts: list[_Expert], rows: slice, group: ExpertGroup, encoder: Encoder | None
) -> Iterator[tuple[_Expert, slice]]:
    """Each of a family's experts with each block of the rows; the blocks are the codec's own, whatever others there are.

    The chunks of a stream come in order of the rows, as they do where all experts are stored so; else the experts do, so
    that what was decoded of one is used up before the next.
    """
    step = _together(family.codec, group, encoder) or _block_rows(group)
    blocks = [slice(begin, min(rows.stop, begin + step)) for begin in range(rows.start, rows.stop, step)]
    if family.codec.lossless:
        return ((expert, block) for block in blocks for expert in experts)
    return ((expert, block) for expert in experts for block in blocks)


def _held_reader(source: Source, group: ExpertGroup, block: slice) -> ReadRows:
    """read(i, rows) that keeps the block's rows where they fit in memory: the mean needs them, and then the encoding.

    Where they don't, it keeps those of the expert that was read last if a part of a decoded chunk is asked for.
    """
    fits = TensorSpec((block.stop - block.start, group.shape[1]), group.dtype).nbytes * len(group.members) <= MEAN_BYTES
    chunk, held = source.chunk_rows(group) or 1, {}

    def read(i: int, rows: slice) -> np.ndarray:
        whole = rows.start % chunk == 0 and (rows.stop % chunk == 0 or rows.stop == group.shape[0])
        if not fits and whole and i not in held:
            return source.read(group, i, rows)
        if i not in held:
            if not fits:
                held.clear()
            held[i] = source.read(group, i, block)
        return held[i][rows.start - block.start : rows.stop - block.start]

    return read


def _base_rows(source: Source, base_of: Base | None, group: ExpertGroup, rows: slice, read: ReadRows) -> np.ndarray:
    """The base's stored bits [rows, in]; a mean is taken in steps, so that all experts' rows need not be held."""
    if base_of is None:
        assert isinstance(source, DersSource)
        return source.read_base(group, rows)
    step = source.chunk_rows(group) or _block_rows(group) if isinstance(base_of, MeanBase) else rows.stop - rows.start
    if step >= rows.stop - rows.start:
        return base_of.rows(group, rows, read)
    starts = range(rows.start, rows.stop, step)
    return np.concatenate([base_of.rows(group, slice(r, min(rows.stop, r + step)), read) for r in starts])


def _write_parts(writer: ShardWriter, unit: Unit, expert: _Expert, rows: slice, parts: Parts) -> None:
    family = expert.family
    for part, data in parts.items():
        name = f"{unit.group.name}.{family.prefix}{part}"
        one = writer.tensors[name].nbytes // len(family.members)
        skipped = 0 if part in family.codec.whole else rows.start * (one // unit.group.shape[0])
        writer.write(name, expert.place * one + skipped, data)


def _write_chunk(
    writer: ShardWriter, unit: Unit, expert: _Expert, rows: slice, chunk: np.ndarray, stream: BinaryIO, spool: Path
) -> None:
    """A chunk of rows goes to the end of the stream, where it stands there into `extents`."""
    step = expert.family.codec.block_rows(unit.group.shape)
    number = expert.place * -(-unit.group.shape[0] // step) + rows.start // step
    extent = np.array([stream.tell(), stream.tell() + chunk.nbytes], np.int64)
    writer.write(f"{unit.group.name}.{expert.family.prefix}extents", number * extent.nbytes, extent)
    with of_file(spool):
        stream.write(chunk)


def _name_nonfinite(
    error: NonFiniteError, source: Source, group: ExpertGroup, block: slice, read: ReadRows
) -> CheckpointError:
    """Whose NaN or infinity it is: an expert's, or the base's."""
    for i, (_, view) in enumerate(group.members):
        value = floats.widen(read(i, block)[error.row - block.start, error.column : error.column + 1], group.dtype)[0]
        if not np.isfinite(value):
            row, column = original_place(source, group, i, error.row, error.column)
            return CheckpointError(
                f"{view.tensor}: {value} at [{row}, {column}] of expert {group.members[i][0]}'s "
                f"{group.projection} matrix {list(group.shape)}; only --delta exact keeps such values"
            )
    return CheckpointError(
        f"{group.name}: row {error.row}, column {error.column}: the difference from the base, or what stands for it, passes the "
        "range of its numbers; use --delta exact"
    )
