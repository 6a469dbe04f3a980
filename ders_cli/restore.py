"""DeRS -> the plain MoE checkpoint: the source's own names, layout, shards, header bytes and config.json.

Every expert is synthesised block by block and hashed on the way; a hash that is not the one noted at conversion
stops the run. With the exact codec that is the hash of the original expert, so the files are the original's bytes.
"""

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from .checkpoint.manifest import index_text, write_file
from .checkpoint.reader import INDEX
from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import ShardWriter, header_text
from .engines import local
from .errors import CheckpointError, UsageError
from .layouts import ExpertGroup, MatrixView
from .output import Options, begin, carry, check_space, copy_file, publish, refuse_occupied
from .report import Progress, shown
from .source import DersSource

Held = dict[str, list[tuple[ExpertGroup, int, MatrixView]]]  # stored tensor -> the experts that it holds


def source_specs(source: DersSource) -> dict[str, TensorSpec]:
    """Every tensor of the original, as ders.json lists them."""
    files = source.manifest["source"]["files"].values()
    return {name: spec for entry in files for name, spec in _specs(entry).items()}


def check_places(source: DersSource) -> None:
    """Raise CheckpointError unless ders.json's source files are made of just the experts and the copied tensors."""
    listed, filled = source_specs(source), defaultdict(int)
    for group in source.groups:
        for label, view in group.members:
            spec, (rows, columns) = listed.get(view.tensor), group.shape
            last = view.offset + (rows - 1) * view.row_stride + (columns - 1) * view.column_stride
            if spec is None or spec.dtype != group.dtype or last >= spec.size:
                raise CheckpointError(f"ders.json: {group.name}, expert {label}: has no place in {view.tensor!r:.120}")
            filled[view.tensor] += rows * columns
    for name, spec in listed.items():
        if name in filled and filled[name] != spec.size:
            raise CheckpointError(f"ders.json: {name}: {spec.size} elements, of which experts fill {filled[name]}")
        if name not in filled and source.copied.get(name) != spec:
            raise CheckpointError(f"{name}: ders.json lists it as a tensor of the source, but it is not here as such")
    try:
        if not isinstance(json.loads(source.manifest["source"]["config"]), dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(f"ders.json: source.config: expected config.json's text: {error}") from None


def planned_restore(source: DersSource) -> dict[str, Any]:
    """Bytes in and out, from ders.json alone."""
    files = {file: _file_bytes(entry) for file, entry in source.manifest["source"]["files"].items()}
    reader = source.reader
    others = len(source.manifest["source"]["config"].encode()) + len(_index_bytes(source) or b"")
    return {
        "source_bytes": sum((reader.folder / f).stat().st_size for f in reader.files),
        "output_bytes": sum(files.values()) + others + sum(p.stat().st_size for p in carry(reader.folder)),
        "exact": True,
        "shards": len(files),
    }


def restore(source: DersSource, out: Path, options: Options) -> dict[str, Any]:
    """Write the plain checkpoint; returns the bytes written. Raises CheckpointError where a hash does not match."""
    refuse_occupied(out, options, source.reader.folder)
    check_places(source)
    totals = planned_restore(source)
    check_space(out, totals["output_bytes"])
    folder = begin(out, options, _fingerprint(source))
    held: Held = defaultdict(list)
    for group in source.groups:
        for member, (_, view) in enumerate(group.members):
            held[view.tensor].append((group, member, view))
    with shown(f"restoring {out.name}", totals["output_bytes"], options.quiet) as progress:
        for file, entry in source.manifest["source"]["files"].items():
            if not (options.resume and (folder / file).exists()):
                _file(source, folder / file, entry, held, options.jobs, progress)
    for path in carry(source.reader.folder):
        copy_file(path, folder / path.name)
    write_file(folder / "config.json", source.manifest["source"]["config"].encode())
    if (index := _index_bytes(source)) is not None:
        write_file(folder / INDEX, index)
    publish(folder, out)
    return totals


def _fingerprint(source: DersSource) -> dict[str, str]:
    return {"source": source.manifest["checksum"]}


def _specs(entry: dict[str, Any]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(shape), dtype) for name, dtype, shape in entry["tensors"]}


def _header(entry: dict[str, Any]) -> bytes:
    return entry["header"].encode() if "header" in entry else header_text(_specs(entry), entry["metadata"])


def _file_bytes(entry: dict[str, Any]) -> int:
    return 8 + len(_header(entry)) + sum(spec.nbytes for spec in _specs(entry).values())


def _index_bytes(source: DersSource) -> bytes | None:
    index, files = source.manifest["source"]["index"], source.manifest["source"]["files"]
    if index is None:
        return None
    if "text" in index:
        return index["text"].encode()
    return index_text({name: file for file, e in files.items() for name, _, _ in e["tensors"]}, index["metadata"])


def _file(source: DersSource, path: Path, entry: dict[str, Any], held: Held, jobs: int, progress: Progress) -> None:
    """One file of the original. The matrices of one tensor may interleave, so a tensor is one task."""
    writer = ShardWriter(path, _specs(entry), header=_header(entry))
    try:
        tasks = [
            partial(_experts, source, writer, held[name], progress)
            if name in held
            else partial(_copy, source, writer, name, progress)
            for name in writer.tensors
        ]
        local.run(tasks, jobs)
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def _copy(source: DersSource, writer: ShardWriter, name: str, progress: Progress) -> None:
    digest, at = blake3(), 0
    for chunk in source.reader.chunks(name):
        writer.write(name, at, chunk)
        digest.update(chunk)
        at += chunk.nbytes
        progress.advance(chunk.nbytes)
    if [digest.hexdigest()] != source.manifest["tensors"][name]:
        raise CheckpointError(f"{name}: its bytes do not have the hash in ders.json; the checkpoint is damaged")


def _experts(
    source: DersSource, writer: ShardWriter, held: list[tuple[ExpertGroup, int, MatrixView]], progress: Progress
) -> None:
    for group, member, view in held:
        digest = blake3()
        for rows in source.blocks(group):
            block = source.read(group, member, rows)
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
            writer.write_view(view.tensor, view.offset, (view.row_stride, view.column_stride), rows.start, block)
            progress.advance(block.nbytes)
        expected = source.entry(group)["members"][member]["restored_hash"]
        if digest.hexdigest() != expected:
            raise CheckpointError(
                f"{view.tensor}: expert {group.members[member][0]} of {group.name} does not decode to what was stored; "
                "the checkpoint is damaged (`ders verify` says where)"
            )


def require_ders(source: object, folder: Path) -> DersSource:
    """The source as a DersSource. Raises UsageError if it is a plain checkpoint."""
    if not isinstance(source, DersSource):
        raise UsageError(f"{folder}: no ders.json; this is a plain checkpoint, there is nothing to restore")
    return source
