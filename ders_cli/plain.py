"""Writing a plain MoE checkpoint from any source: names, layout, shards, header bytes and config.json as its form says.

Every expert is synthesised block by block. Where the source is a DeRS checkpoint it is hashed on the way, and a hash
that is not the one noted in ders.json stops the run.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from . import __version__
from .aligned import order_of, put_back
from .carried import carried_hashes, check_carried, copy_carried
from .checkpoint.manifest import index_text, write_file
from .checkpoint.reader import INDEX
from .checkpoint.tensor import STORAGE, TensorSpec
from .checkpoint.writer import ShardWriter, header_text
from .engines import local
from .errors import CheckpointError
from .layouts import ExpertGroup
from .output import OWN, Options, begin, carry, check_space, publish
from .report import Progress, shown
from .source import DersSource, Source

Held = dict[str, list[tuple[ExpertGroup, int]]]  # stored tensor -> the experts that it holds
Piece = dict[str, tuple[ExpertGroup, list[int]]]  # group's name -> the group, and those of its experts that are meant


def specs_of(entry: dict[str, Any]) -> dict[str, TensorSpec]:
    """One file of a form: its tensors, in file order."""
    return {name: TensorSpec(tuple(shape), dtype) for name, dtype, shape in entry["tensors"]}


def planned_plain(source: Source) -> dict[str, Any]:
    """Bytes in and out, from headers alone."""
    check_carried(source)
    form, reader = source.form(), source.reader
    files = {file: _file_bytes(entry) for file, entry in form["files"].items()}
    others = len(form["config"].encode()) + len(_index_bytes(form) or b"")
    return {
        "source_bytes": sum((reader.folder / f).stat().st_size for f in reader.files),
        "output_bytes": sum(files.values()) + others + sum(p.stat().st_size for p in carry(reader.folder)),
        "exact": True,
        "shards": len(files),
    }


def write_plain(source: Source, out: Path, options: Options, fingerprint: dict[str, Any], title: str) -> dict[str, Any]:
    """Write the folder; returns the bytes. The caller has checked that `out` may be written."""
    totals, form = planned_plain(source), source.form()
    check_space(out, totals["output_bytes"], options)
    held: Held = defaultdict(list)
    for group in source.groups:
        for member, (_, view) in enumerate(group.members):
            held[view.tensor].append((group, member))
    hashes = carried_hashes(source)
    source.check_unchanged()  # so the mark is of what was opened
    with begin(out, options, fingerprint | {"version of ders": __version__, "carried": hashes}) as folder:
        if folder is None:
            return totals
        with shown(title, totals["output_bytes"], options.quiet) as progress:
            job = partial(_file, source, folder, held, options)
            options.run_shards(job, len(form["files"]), folder, options.jobs, progress)
        copy_carried(source, folder, hashes)
        write_file(folder / "config.json", form["config"].encode())
        if (index := _index_bytes(form)) is not None:
            write_file(folder / INDEX, index)
        source.check_unchanged()
        publish(folder, out, options)
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
    """One file of the original, or what the last run left to do of it."""
    file, entry = list(source.form()["files"].items())[number]
    path, journal = folder / file, folder / f"{OWN}{file}.journal"
    if options.resume and path.exists() and not options.target.has(path):
        options.target.put(path)
    if options.resume and options.target.has(path):
        progress.advance(_file_bytes(entry))
        for name in specs_of(entry):
            source.reader.done(name)
            for group, member in held.get(name, []):
                source.done(group, [member])
        return
    writer = ShardWriter(path, specs_of(entry), header=_header(entry), journal=journal, resume=options.resume)
    try:
        tasks = [partial(_copy, source, writer, name, progress) for name in writer.tensors if name not in held]
        tasks += [
            partial(_experts, source, writer, piece, progress)
            for piece in _pieces(writer.tensors, _left(source, writer, held, progress), options.jobs)
        ]
        local.run(tasks, options.jobs)
        source.check_unchanged()
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    options.target.put(path)
    journal.unlink(missing_ok=True)


def _left(source: Source, writer: ShardWriter, held: Held, progress: Progress) -> Held:
    """The experts of each tensor of a file that are not written yet."""
    left: Held = {}
    for name in writer.tensors:
        for group, member in held.get(name, []):
            if _key(group, member) not in writer.finished:
                left.setdefault(name, []).append((group, member))
                continue
            progress.advance(TensorSpec(group.shape, group.dtype).nbytes)
            source.done(group, [member])
    return left


def _key(group: ExpertGroup, member: int) -> str:
    return f"expert {group.members[member][0]} of {group.name}"


def _pieces(names: Iterable[str], held: Held, jobs: int) -> list[Piece]:
    """The experts in some tensors, in tasks of whole groups, or of parts of them where there are more threads than groups.

    Matrices of one tensor may interleave: they are one task.
    """
    pieces: dict[str, Piece] = {}  # group's name -> the piece that it is in
    for experts in (held[name] for name in names if name in held):
        touched = {id(piece): piece for group, _ in experts if (piece := pieces.get(group.name)) is not None}
        whole: Piece = {}
        for piece in touched.values():
            whole |= piece
        for group, member in experts:
            whole.setdefault(group.name, (group, []))[1].append(member)
        pieces |= dict.fromkeys(whole, whole)
    found = list({id(piece): piece for piece in pieces.values()}.values())
    return [part for piece in found for part in _parts(piece, held, -(-jobs // len(found)))]


def _parts(piece: Piece, held: Held, count: int) -> list[Piece]:
    """A piece of one group, each expert in a tensor of its own, cut into up to `count`; any other as it is."""
    (group, members), *others = piece.values()
    if others or any(len(held[group.members[member][1].tensor]) > 1 for member in members):
        return [piece]
    return [{group.name: (group, members[first::count])} for first in range(min(count, len(members)))]


def _copy(source: Source, writer: ShardWriter, name: str, progress: Progress) -> None:
    key, digest, at = f"copied {name}", blake3(), 0
    if key in writer.finished:
        progress.advance(writer.tensors[name].nbytes)
        source.reader.done(name)
        return
    for chunk in source.chunks(name):
        writer.write(name, at, chunk)
        digest.update(chunk)
        at += chunk.nbytes
        progress.advance(chunk.nbytes)
    source.reader.done(name)
    if isinstance(source, DersSource) and [digest.hexdigest()] != source.manifest["tensors"][name]:
        raise CheckpointError(f"{name}: its bytes do not have the hash in ders.json; the checkpoint is damaged")
    writer.finish(key, [])


def _experts(source: Source, writer: ShardWriter, piece: Piece, progress: Progress) -> None:
    for group, members in piece.values():
        if (table := order_of(source, group)) is not None:
            digests = [_put_back(source, writer, group, member, table[member], progress) for member in members]
        else:
            digests = _in_blocks(source, writer, group, members, progress)
        source.done(group, members)
        if isinstance(source, DersSource):
            _check(source, group, members, digests)
        for member in members:
            writer.finish(_key(group, member), [])


def _in_blocks(
    source: Source, writer: ShardWriter, group: ExpertGroup, members: list[int], progress: Progress
) -> list[blake3]:
    """Write some experts of a group; what was hashed of each."""
    digests = [blake3() for _ in members]
    for rows in source.blocks(group):
        for member, digest, block in zip(members, digests, source.read_experts(group, members, rows), strict=True):
            view = group.members[member][1]
            digest.update(block.reshape(-1).view(np.uint8))
            writer.write_view(view.tensor, view.offset, (view.row_stride, view.column_stride), rows.start, block)
            progress.advance(block.nbytes)
    return digests


def _put_back(
    source: Source, writer: ShardWriter, group: ExpertGroup, member: int, order: np.ndarray, progress: Progress
) -> blake3:
    """Write an expert whose neurons stand in another order than the original's; what was hashed, in the order as stored.

    Its whole matrix is held: in a file that keeps it transposed, single rows would be written weight by weight.
    """
    view, digest, original = group.members[member][1], blake3(), np.empty(group.shape, STORAGE[group.dtype])
    for rows in source.blocks(group):
        block = source.read(group, member, rows)
        digest.update(block.reshape(-1).view(np.uint8))
        put_back(original, group.projection, order, rows, block)
        progress.advance(block.nbytes)
    writer.write_view(view.tensor, view.offset, (view.row_stride, view.column_stride), 0, original)
    return digest


def _check(source: DersSource, group: ExpertGroup, members: list[int], digests: list[blake3]) -> None:
    for member, digest in zip(members, digests, strict=True):
        if digest.hexdigest() != source.entry(group)["members"][member]["restored_hash"]:
            raise CheckpointError(
                f"{group.members[member][1].tensor}: expert {group.members[member][0]} of {group.name} does not decode to "
                "what was stored; the checkpoint is damaged (`ders verify` says where)"
            )
