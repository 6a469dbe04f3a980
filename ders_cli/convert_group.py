"""One group of experts, block by block of rows: read, base, encode, write at its place, decode, measure.

This is where a conversion's time and memory go: the rows of all experts of one block (where they fit MEAN_BYTES), and
fp32 copies of one expert's rows.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats

from .base import MEAN_BYTES, Base, MeanBase
from .checkpoint.files import of_file
from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import ShardWriter
from .codecs.base import NonFiniteError, Parts
from .describe import group_entry
from .differences import Differences
from .errors import CheckpointError
from .layouts import ExpertGroup
from .plan import Unit
from .report import Progress
from .source import BLOCK_WEIGHTS, DersSource, Source, row_blocks

ReadRows = Callable[[int, slice], np.ndarray]  # (expert, rows) -> stored bits


def convert_group(
    source: Source, base_of: Base | None, seed: int, unit: Unit, writer: ShardWriter, spool: Path, progress: Progress
) -> dict[str, Any]:
    """Code one group into its places in `writer`, and a stream into the file `spool`; its entry for ders.json.

    `base_of` is None where the source is a DeRS checkpoint that brings its own base. Raises CheckpointError.
    """
    group, codec = unit.group, unit.codec
    experts, out = len(group.members), group.shape[0]
    together = codec.block_rows(group.shape)
    keys = [make_key(seed, group.name, label) for label, _ in group.members]
    came, restored = [blake3() for _ in keys], [blake3() for _ in keys]
    differences = [Differences() for _ in keys]
    stream = spool.open("wb") if codec.lossless else None
    for number, rows in enumerate(row_blocks(group.shape, together or _block_rows(group))):
        read = _held_reader(source, group, rows)
        base = _base_rows(source, base_of, group, rows, read)
        writer.write(f"{group.name}.base", rows.start * base[:1].nbytes, base)
        for i in range(experts):
            parts, coded = source.given(group, i, codec, keys[i]), None
            if parts is None:
                expert = read(i, rows)
                try:
                    parts = codec.encode_expert(expert, base, group.dtype, keys[i], rows.start)
                except NonFiniteError as error:
                    raise _name_nonfinite(error, group, rows, read) from None
            else:
                expert = coded = codec.decode_expert(parts, base, group.dtype, keys[i], rows.start)
            came[i].update(expert.reshape(-1).view(np.uint8))
            if stream is not None:
                chunk = parts.pop("stream")
                end = stream.tell() + chunk.nbytes
                chunks = -(-out // together)
                extent = np.array([stream.tell(), end], np.int64)
                writer.write(f"{group.name}.delta.extents", (i * chunks + number) * extent.nbytes, extent)
                with of_file(spool):
                    stream.write(chunk)
            else:
                _write_parts(writer, unit, i, rows, parts)
                if coded is None:
                    coded = codec.decode_expert(parts, base, group.dtype, keys[i], rows.start)
                restored[i].update(coded.reshape(-1).view(np.uint8))
                differences[i].add(expert, coded, base, group.dtype)
            progress.advance(expert.nbytes)
        del read, base
    source.done(group, range(experts))
    if stream is not None:
        with of_file(spool):
            stream.close()
        restored = came
    for (label, _), differing in zip(group.members, differences, strict=True):
        if not differing.finite:
            raise CheckpointError(
                f"{group.name}, expert {label}: coded by {codec.term} it passes the range of {group.dtype}; use exact"
            )
    found = [digest.hexdigest() for digest in came]
    if isinstance(source, DersSource):
        _refuse_damaged(source, group, found)
    errors = [differing.errors() for differing in differences]
    return group_entry(unit, found, [digest.hexdigest() for digest in restored], errors)


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


def _held_reader(source: Source, group: ExpertGroup, block: slice) -> ReadRows:
    """read(i, rows) that keeps the block's rows where they fit in memory: the mean needs them, and then the encoding."""
    fits = TensorSpec((block.stop - block.start, group.shape[1]), group.dtype).nbytes * len(group.members) <= MEAN_BYTES
    held: dict[int, np.ndarray] = {}

    def read(i: int, rows: slice) -> np.ndarray:
        if not fits:
            return source.read(group, i, rows)
        if i not in held:
            held[i] = source.read(group, i, block)
        return held[i][rows.start - block.start : rows.stop - block.start]

    return read


def _base_rows(source: Source, base_of: Base | None, group: ExpertGroup, rows: slice, read: ReadRows) -> np.ndarray:
    """The base's stored bits [rows, in]; a mean is taken in steps, so that all experts' rows need not be held."""
    if base_of is None:
        assert isinstance(source, DersSource)
        return source.read_base(group, rows)
    step = _block_rows(group) if isinstance(base_of, MeanBase) else rows.stop - rows.start
    if step >= rows.stop - rows.start:
        return base_of.rows(group, rows, read)
    starts = range(rows.start, rows.stop, step)
    return np.concatenate([base_of.rows(group, slice(r, min(rows.stop, r + step)), read) for r in starts])


def _write_parts(writer: ShardWriter, unit: Unit, member: int, rows: slice, parts: Parts) -> None:
    for part, data in parts.items():
        name = f"{unit.group.name}.delta.{part}"
        one = writer.tensors[name].nbytes // len(unit.group.members)
        skipped = 0 if part in unit.codec.whole else rows.start * (one // unit.group.shape[0])
        writer.write(name, member * one + skipped, data)


def _name_nonfinite(error: NonFiniteError, group: ExpertGroup, block: slice, read: ReadRows) -> CheckpointError:
    """Whose NaN or infinity it is: an expert's, or the base's."""
    for i, (_, view) in enumerate(group.members):
        value = floats.widen(read(i, block)[error.row - block.start, error.column : error.column + 1], group.dtype)[0]
        if not np.isfinite(value):
            return CheckpointError(
                f"{view.tensor}: {value} at [{error.row}, {error.column}] of expert {group.members[i][0]}'s "
                f"{group.projection} matrix {list(group.shape)}; only --delta exact keeps such values"
            )
    return CheckpointError(
        f"{group.name}: row {error.row}, column {error.column}: the difference from the base, or what stands for it, passes the "
        "range of its numbers; use --delta exact"
    )
