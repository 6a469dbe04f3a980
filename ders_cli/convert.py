"""The walk: a source's experts become base + coded deltas, shard by shard, block by block of rows.

    headers -> plan -> per shard: copied tensors and groups, in threads -> header, fsync, rename
            -> config.json, index, ders.json -> OUT.partial becomes OUT

A folder with its final name is complete. Memory is a few blocks a thread, whatever the model. A killed run resumes
at its first unfinished shard and gives the bytes of an undisturbed one; so do any thread count and any block size.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats, sums

from . import __version__
from .base import MEAN_BYTES, Base, MeanBase, make_base
from .checkpoint.manifest import MANIFEST, file_names, index_text, manifest_text, write_file
from .checkpoint.reader import INDEX
from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import ShardWriter
from .codecs.base import NonFiniteError, Parts
from .describe import config_text, describe, group_entry, planned_manifest_bytes
from .engines import local
from .errors import CheckpointError, UnsupportedError, UsageError
from .layouts import ExpertGroup
from .output import RESULT, Options, begin, carry, check_space, copy_file, publish, refuse_occupied
from .plan import GUARD_TEXT, Plan, ShardPlan, Unit, make_plan
from .recipe import Recipe
from .report import Progress, human_bytes, shown
from .source import BLOCK_WEIGHTS, DersSource, Source, row_blocks

ReadRows = Callable[[int, slice], np.ndarray]  # (expert, rows) -> stored bits


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: what is read, what will be written, in bytes."""

    source: Source
    recipe: Recipe
    base: Base | None
    plan: Plan
    out: Path
    options: Options

    def totals(self) -> dict[str, Any]:
        """Bytes in and out. `exact`: the output will have just these bytes; else they are an upper bound."""
        folder, shards, index = self.source.reader.folder, self.plan.shards, b""
        if len(shards) > 1:
            by_name = {name: shard.file for shard in shards for name in (*shard.fixed, *shard.appended)}
            index = index_text(by_name, {"total_size": self.plan.weight_bytes})
        others = len(config_text(self.source)) + len(index) + planned_manifest_bytes(self.source, self.recipe, self.plan)
        return {
            "source_bytes": sum((folder / file).stat().st_size for file in self.source.reader.files),
            "expert_bytes": self.plan.expert_bytes,
            "output_bytes": self.plan.weight_bytes + self.plan.stream_bound + others + sum(p.stat().st_size for p in carry(folder)),
            "exact": self.plan.stream_bound == 0,
            "shards": len(shards),
            "peak_memory_bytes": self.plan.peak_memory(self.options.jobs),
        }


def prepare(source: Source, recipe: Recipe, out: Path, options: Options) -> Conversion:
    """Everything that can be refused is refused here, before a byte is written."""
    if isinstance(source, DersSource):
        if not source.lossless:
            raise UsageError(
                f"{source.reader.folder}: its deltas are lossy already; convert the original model, or its `ders decompose`"
            )
        base, kept = None, source.manifest["recipe"]
        recipe = recipe.model_copy(update={"base": kept["base"], "shared": kept["shared"]})
    else:
        base = make_base(recipe.base)
        recipe = recipe.model_copy(update={"base": base.label})
    if source.reader.config.get("quantization_config", {}).get("quant_method", "ders") != "ders":
        method = source.reader.config["quantization_config"]["quant_method"]
        raise UnsupportedError(f"{source.reader.folder}: quantised by {method!r}; dequantise it to bf16 first")
    plan = make_plan(source, recipe, base, options.max_shard_bytes)
    refuse_occupied(out, options)
    if options.max_memory is not None:
        options = replace(options, jobs=_jobs_within(plan, options))
    return Conversion(source, recipe, base, plan, out, options)


def _jobs_within(plan: Plan, options: Options) -> int:
    for jobs in range(options.jobs, 0, -1):
        if plan.peak_memory(jobs) <= options.max_memory:
            return jobs
    raise UsageError(
        f"--max-memory {human_bytes(options.max_memory)}: one thread needs about {human_bytes(plan.peak_memory(1))} for this model"
    )


def run(conversion: Conversion) -> dict[str, Any]:
    """Write OUT; returns ders.json's content. On any error OUT does not come to be."""
    source, plan, options = conversion.source, conversion.plan, conversion.options
    check_space(conversion.out, conversion.totals()["output_bytes"])
    folder = begin(conversion.out, options, _fingerprint(conversion))
    total = plan.expert_bytes + sum(spec.nbytes for spec in source.copied.values())
    with shown(f"writing {conversion.out.name}", total, options.quiet) as progress:
        results = [_shard(conversion, shard, folder, progress) for shard in plan.shards]
    for path in carry(source.reader.folder):
        copy_file(path, folder / path.name)
    manifest = describe(source, conversion.recipe, plan, results)
    write_file(folder / "config.json", config_text(source))
    if len(results) > 1:
        by_name = {name: file for file, result in zip(file_names(len(results)), results, strict=True) for name in result["hashes"]}
        write_file(folder / INDEX, index_text(by_name, {"total_size": sum(result["bytes"] for result in results)}))
    write_file(folder / MANIFEST, manifest_text(manifest, planned_manifest_bytes(source, conversion.recipe, plan)))
    publish(folder, conversion.out)
    return manifest


def _fingerprint(conversion: Conversion) -> dict[str, str]:
    """What must be the same for a run to be continued."""
    reader = conversion.source.reader
    stats = [(f, (reader.folder / f).stat().st_size, (reader.folder / f).stat().st_mtime_ns) for f in reader.files]
    return {
        "version of ders": __version__,
        "recipe": hashlib.sha256(conversion.recipe.model_dump_json().encode()).hexdigest(),
        "source": hashlib.sha256(repr([stats, [h.text for h in reader.headers.values()]]).encode()).hexdigest(),
        "shard size": str(conversion.options.max_shard_bytes),
    }


def _shard(conversion: Conversion, shard: ShardPlan, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write one shard, or take it as the last run left it; its result: {"hashes", "groups", "sizes", "bytes"}."""
    record = folder / (shard.file + RESULT)
    if conversion.options.resume and record.exists() and (folder / shard.file).exists():
        return json.loads(record.read_text())
    writer = ShardWriter(folder / shard.file, shard.fixed, shard.appended)
    try:
        tasks = [partial(_copy, conversion.source, writer, name, progress) for name in shard.copied]
        spools = [folder / f"{shard.file}.{number}.spool" for number in range(len(shard.units))]
        tasks += [
            partial(_convert_group, conversion, unit, writer, spool, progress)
            for unit, spool in zip(shard.units, spools, strict=True)
        ]
        for name in shard.guards:
            writer.write(name, 0, np.frombuffer(GUARD_TEXT, np.uint8))
        entries = local.run(tasks, conversion.options.jobs)[len(shard.copied) :]
        for unit, spool in zip(shard.units, spools, strict=True):
            _append_stream(writer, unit, spool)
        sizes = {name: writer.tensors[name].nbytes for name in shard.appended}
        result = {"hashes": writer.hashes(shard.slices), "groups": entries, "sizes": sizes}
        result["bytes"] = writer.close()
    except BaseException:
        writer.abandon()
        raise
    write_file(record, json.dumps(result).encode())
    return result


def _copy(source: Source, writer: ShardWriter, name: str, progress: Progress) -> None:
    at = 0
    for chunk in source.reader.chunks(name):
        writer.write(name, at, chunk)
        at += chunk.nbytes
        progress.advance(chunk.nbytes)


def _append_stream(writer: ShardWriter, unit: Unit, spool: Path) -> None:
    """Move a unit's spooled stream behind the shard's fixed part."""
    for name in (name for name, spec in unit.parts.items() if spec is None):
        with spool.open("rb") as file:
            spec = TensorSpec((spool.stat().st_size,), "U8")
            writer.append(name, spec, (np.frombuffer(data, np.uint8) for data in iter(partial(file.read, 4 << 20), b"")))
        spool.unlink()


def _convert_group(
    conversion: Conversion, unit: Unit, writer: ShardWriter, spool: Path, progress: Progress
) -> dict[str, Any]:
    """Code one group, block by block; its entry for ders.json."""
    source, group, codec = conversion.source, unit.group, unit.codec
    experts, (out, width) = len(group.members), group.shape
    together = codec.block_rows(group.shape)
    keys = [make_key(conversion.recipe.seed, group.name, label) for label, _ in group.members]
    came, restored = [blake3() for _ in keys], [blake3() for _ in keys]
    totals, worst = np.zeros((experts, len(sums.NAMES))), np.zeros(experts, np.float32)
    stream = spool.open("wb") if codec.lossless else None
    for number, rows in enumerate(row_blocks(group.shape, together or _block_rows(group))):
        read = _held_reader(source, group, rows)
        base = _base_rows(conversion, group, rows, read)
        writer.write(f"{group.name}.base", rows.start * base[:1].nbytes, base)
        for i in range(experts):
            expert = read(i, rows)
            came[i].update(expert.reshape(-1).view(np.uint8))
            try:
                parts = codec.encode_expert(expert, base, group.dtype, keys[i], rows.start)
            except NonFiniteError as error:
                raise _name_nonfinite(error, group, rows, read) from None
            if stream is not None:
                chunk = parts.pop("stream")
                end = stream.tell() + chunk.nbytes
                chunks = -(-out // together)
                extent = np.array([stream.tell(), end], np.int64)
                writer.write(f"{group.name}.delta.extents", (i * chunks + number) * extent.nbytes, extent)
                stream.write(chunk)
            else:
                _write_parts(writer, unit, i, rows, parts)
                coded = codec.decode_expert(parts, base, group.dtype, keys[i], rows.start)
                restored[i].update(coded.reshape(-1).view(np.uint8))
                _add_differences(group, expert, coded, base, totals[i], worst[i : i + 1])
            progress.advance(expert.nbytes)
        del read, base
    if stream is not None:
        stream.close()
        restored = came
    if not np.isfinite(worst).all():
        label = group.members[int(np.argmin(np.isfinite(worst)))][0]
        raise CheckpointError(f"{group.name}, expert {label}: coded by {codec.term} it passes the range of {group.dtype}; use exact")
    return group_entry(unit, [h.hexdigest() for h in came], [h.hexdigest() for h in restored], totals, worst)


def _block_rows(group: ExpertGroup) -> int:
    """Rows of a block: about BLOCK_WEIGHTS of one expert, fewer where all experts' rows would not fit MEAN_BYTES."""
    row_bytes = TensorSpec((1, group.shape[1]), group.dtype).nbytes * len(group.members)
    return max(1, min(BLOCK_WEIGHTS // group.shape[1], MEAN_BYTES // row_bytes))


def _held_reader(source: Source, group: ExpertGroup, block: slice) -> ReadRows:
    """read(i, rows) that keeps the block's rows where they fit in memory: the mean needs them, and then the encoding."""
    fits = TensorSpec((block.stop - block.start, group.shape[1]), group.dtype).nbytes * len(group.members) <= MEAN_BYTES
    held: dict[int, np.ndarray] = {}

    def read(i: int, rows: slice) -> np.ndarray:
        if rows != block or not fits:
            return source.read(group, i, rows)
        if i not in held:
            held[i] = source.read(group, i, rows)
        return held[i]

    return read


def _base_rows(conversion: Conversion, group: ExpertGroup, rows: slice, read: ReadRows) -> np.ndarray:
    if conversion.base is None:
        return conversion.source.read_base(group, rows)
    step = _block_rows(group) if isinstance(conversion.base, MeanBase) else rows.stop - rows.start
    if step >= rows.stop - rows.start:
        return conversion.base.rows(group, rows, read)
    starts = range(rows.start, rows.stop, step)
    return np.concatenate([conversion.base.rows(group, slice(r, min(rows.stop, r + step)), read) for r in starts])


def _write_parts(writer: ShardWriter, unit: Unit, member: int, rows: slice, parts: Parts) -> None:
    for part, data in parts.items():
        name = f"{unit.group.name}.delta.{part}"
        one = writer.tensors[name].nbytes // len(unit.group.members)
        skipped = 0 if part in unit.codec.whole else rows.start * (one // unit.group.shape[0])
        writer.write(name, member * one + skipped, data)


def _add_differences(
    group: ExpertGroup, expert: np.ndarray, coded: np.ndarray, base: np.ndarray, totals: np.ndarray, worst: np.ndarray
) -> None:
    """Add a block's sums [6] and keep its largest difference [1]."""
    rows = np.empty((expert.shape[0], len(sums.NAMES)))
    most = np.empty(expert.shape[0], np.float32)
    sums.differences(*(floats.widen(bits, group.dtype) for bits in (expert, coded, base)), rows, most)
    finite = np.isfinite(rows).all()
    worst[0] = np.maximum(worst[0], most.max()) if finite else np.inf
    if finite:
        totals += [math.fsum(column) for column in rows.T]


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
        f"{group.name}: base and difference from it pass the range of fp32 at [{error.row}, {error.column}]; use --delta exact"
    )
