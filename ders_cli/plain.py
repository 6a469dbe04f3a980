"""Writing a plain MoE checkpoint from any source: names, layout, shards, header bytes and config.json as its form says.

Every expert is synthesised block by block. Where the source is a DeRS checkpoint it is hashed on the way, and a hash
that is not the one noted in ders.json stops the run.
"""

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
from .errors import CheckpointError
from .layouts import ExpertGroup, MatrixView
from .output import Options, begin, carry, check_space, copy_file, publish
from .report import Progress, shown
from .source import DersSource, Source

Held = dict[str, list[tuple[ExpertGroup, int, MatrixView]]]  # stored tensor -> the experts that it holds


def specs_of(entry: dict[str, Any]) -> dict[str, TensorSpec]:
    """One file of a form: its tensors, in file order."""
    return {name: TensorSpec(tuple(shape), dtype) for name, dtype, shape in entry["tensors"]}


def planned_plain(source: Source) -> dict[str, Any]:
    """Bytes in and out, from headers alone."""
    form, reader = source.form(), source.reader
    files = {file: _file_bytes(entry) for file, entry in form["files"].items()}
    others = len(form["config"].encode()) + len(_index_bytes(form) or b"")
    return {
        "source_bytes": sum((reader.folder / f).stat().st_size for f in reader.files),
        "output_bytes": sum(files.values()) + others + sum(p.stat().st_size for p in carry(reader.folder)),
        "exact": True,
        "shards": len(files),
    }


def write_plain(source: Source, out: Path, options: Options, fingerprint: dict[str, str], title: str) -> dict[str, Any]:
    """Write the folder; returns the bytes. The caller has checked that `out` may be written."""
    totals, form = planned_plain(source), source.form()
    check_space(out, totals["output_bytes"])
    folder = begin(out, options, fingerprint)
    held: Held = defaultdict(list)
    for group in source.groups:
        for member, (_, view) in enumerate(group.members):
            held[view.tensor].append((group, member, view))
    with shown(title, totals["output_bytes"], options.quiet) as progress:
        options.run_shards(partial(_file, source, folder, held, options), len(form["files"]), progress)
    for path in carry(source.reader.folder):
        copy_file(path, folder / path.name)
    write_file(folder / "config.json", form["config"].encode())
    if (index := _index_bytes(form)) is not None:
        write_file(folder / INDEX, index)
    publish(folder, out)
    return totals


def _header(entry: dict[str, Any]) -> bytes:
    return entry["header"].encode() if "header" in entry else header_text(specs_of(entry), entry["metadata"])


def _file_bytes(entry: dict[str, Any]) -> int:
    return 8 + len(_header(entry)) + sum(spec.nbytes for spec in specs_of(entry).values())


def _index_bytes(form: dict[str, Any]) -> bytes | None:
    index = form["index"]
    if index is None:
        return None
    if "text" in index:
        return index["text"].encode()
    return index_text(
        {name: file for file, e in form["files"].items() for name, _, _ in e["tensors"]}, index["metadata"]
    )


def _file(source: Source, folder: Path, held: Held, options: Options, number: int, progress: Progress) -> None:
    """One file of the original. The matrices of one tensor may interleave, so a tensor is one task."""
    file, entry = list(source.form()["files"].items())[number]
    if options.resume and (folder / file).exists():
        return
    writer = ShardWriter(folder / file, specs_of(entry), header=_header(entry))
    try:
        tasks = [
            partial(_experts, source, writer, held[name], progress)
            if name in held
            else partial(_copy, source, writer, name, progress)
            for name in writer.tensors
        ]
        local.run(tasks, options.jobs)
        writer.close()
    except BaseException:
        writer.abandon()
        raise


def _copy(source: Source, writer: ShardWriter, name: str, progress: Progress) -> None:
    digest, at = blake3(), 0
    for chunk in source.chunks(name):
        writer.write(name, at, chunk)
        digest.update(chunk)
        at += chunk.nbytes
        progress.advance(chunk.nbytes)
    source.reader.done(name)
    if isinstance(source, DersSource) and [digest.hexdigest()] != source.manifest["tensors"][name]:
        raise CheckpointError(f"{name}: its bytes do not have the hash in ders.json; the checkpoint is damaged")


def _experts(
    source: Source, writer: ShardWriter, held: list[tuple[ExpertGroup, int, MatrixView]], progress: Progress
) -> None:
    for group, member, view in held:
        digest = blake3()
        for rows in source.blocks(group):
            block = source.read(group, member, rows)
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
            writer.write_view(view.tensor, view.offset, (view.row_stride, view.column_stride), rows.start, block)
            progress.advance(block.nbytes)
        source.done(group, [member])
        if not isinstance(source, DersSource):
            continue
        if digest.hexdigest() != source.entry(group)["members"][member]["restored_hash"]:
            raise CheckpointError(
                f"{view.tensor}: expert {group.members[member][0]} of {group.name} does not decode to what was stored; "
                "the checkpoint is damaged (`ders verify` says where)"
            )
