"""The walk: a source's experts become base + coded deltas, shard by shard, block by block of rows.

    headers -> plan -> per shard: copied tensors and groups, in threads -> header, fsync, rename
            -> config.json, index, ders.json -> OUT.partial becomes OUT

A folder with its final name is complete. Memory is a few blocks a thread, whatever the model. A killed run resumes
at its first unfinished shard and gives the bytes of an undisturbed one; so do any thread count and any block size.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .aligned import orders_of
from .base import Base, DenseBase, make_base
from .carried import carried_hashes, check_carried, copy_carried
from .checkpoint.manifest import MANIFEST, file_names, index_text, manifest_text, read_manifest, write_file
from .checkpoint.reader import INDEX
from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import ShardWriter
from .codecs.mixed import families
from .convert_group import Encoder, convert_group
from .describe import config_text, describe, file_hash, planned_manifest_bytes
from .engines import local
from .errors import CheckpointError, UnsupportedError, UsageError
from .output import OWN, Options, begin, carry, check_space, publish, refuse_occupied
from .plan import GUARD_TEXT, Plan, ShardPlan, Unit, make_plan
from .recipe import Recipe
from .report import Progress, human_bytes, shown
from .source import DersSource, Source

MARKED = (".safetensors", "config.json")  # ends of the names of what a conversion is made of


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: what is read, what will be written, in bytes."""

    source: Source
    recipe: Recipe
    base: Base | None
    plan: Plan
    out: Path
    options: Options
    encoder: Encoder | None = None  # chooses the parts where it can; None: the codecs do

    @cached_property
    def manifest_bytes(self) -> int:
        """The size that ders.json will have: a second of work where there are 70,000 matrices."""
        return planned_manifest_bytes(self.source, self.recipe, self.plan, self.calibration)

    @property
    def calibration(self) -> dict[str, Any] | None:
        """What ders.json says of the encoder."""
        return self.encoder.label if self.encoder else None

    def check_unchanged(self) -> None:
        """Raise DersError if a file that is read is not what it was when it was opened."""
        self.source.check_unchanged()
        if self.base is not None:
            self.base.check_unchanged()
        if self.encoder is not None:
            self.encoder.check_unchanged()

    def totals(self) -> dict[str, Any]:
        """Bytes in and out. `exact`: the output will have just these bytes; else they are an upper bound."""
        folder, shards, index = self.source.reader.folder, self.plan.shards, b""
        if len(shards) > 1:
            by_name = {name: shard.file for shard in shards for name in (*shard.fixed, *shard.appended)}
            index = index_text(by_name, {"total_size": self.plan.weight_bytes})
        others = len(config_text(self.source)) + len(index) + self.manifest_bytes
        return {
            "source_bytes": sum((folder / file).stat().st_size for file in self.source.reader.files),
            "expert_bytes": self.plan.expert_bytes,
            "output_bytes": self.plan.weight_bytes
            + self.plan.stream_bound
            + others
            + sum(p.stat().st_size for p in carry(folder)),
            "exact": self.plan.stream_bound == 0,
            "shards": len(shards),
            "peak_memory_bytes": _peak_memory(self.plan, self.options.jobs, self.encoder),
        }


def prepare(
    source: Source,
    recipe: Recipe,
    out: Path,
    options: Options,
    base: Base | None = None,
    encoder: Encoder | None = None,
) -> Conversion:
    """Everything that can be refused is refused here, before a byte is written. `base`: where the recipe doesn't say it."""
    with ExitStack() as opened:
        if base is None and not isinstance(source, DersSource):
            base = make_base(recipe.base, options.scratch)
            opened.callback(base.close)
        conversion = _prepared(source, recipe, out, options, base, encoder)
        opened.pop_all()
    return conversion


def _prepared(
    source: Source, recipe: Recipe, out: Path, options: Options, base: Base | None, encoder: Encoder | None
) -> Conversion:
    inputs, addresses = [*source.folders, *(base.folders if base else ())], [source.reader.address]
    if base is not None:
        addresses += [base.address] if isinstance(base, DenseBase) else []
        recipe = recipe.model_copy(update={"base": base.label})
    else:
        if not source.lossless:
            raise UsageError(
                f"{source.reader.address}: its deltas are lossy already; convert the original model, or its `ders decompose`"
            )
        kept = source.manifest["recipe"]
        if recipe.base not in ("mean", kept["base"]) or recipe.shared > kept["shared"]:
            raise UsageError(
                f"{source.reader.address}: was decomposed with base {kept['base']}; --base and --shared go with the original model"
            )
        recipe = recipe.model_copy(update={"base": kept["base"], "shared": kept["shared"]})
        orders_of(source)  # each of them is one
    quantised = source.reader.config.get("quantization_config")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
    if method not in (None, "ders"):
        raise UnsupportedError(f"{source.reader.address}: quantised by {method!r}; dequantise it to bf16 first")
    check_carried(source)
    plan = make_plan(source, recipe, base, options.max_shard_bytes)
    refuse_occupied(out, options, *inputs, addresses=addresses)
    if options.max_memory is not None:
        options = replace(options, jobs=_jobs_within(plan, options, encoder))
    return Conversion(source, recipe, base, plan, out, options, encoder)


def _peak_memory(plan: Plan, jobs: int, encoder: Encoder | None) -> int:
    """As the plan's, and what an encoder takes in each thread."""
    if encoder is None:
        return plan.peak_memory(jobs)
    of_units = ((unit.group, families(unit.codec, len(unit.group.members))) for unit in plan.units)
    more = max((encoder.memory(family.codec, group) for group, found in of_units for family in found), default=0)
    return plan.peak_memory(jobs) + jobs * more


def _jobs_within(plan: Plan, options: Options, encoder: Encoder | None) -> int:
    for jobs in range(options.jobs, 0, -1):
        if _peak_memory(plan, jobs, encoder) <= options.max_memory:
            return jobs
    least = human_bytes(_peak_memory(plan, 1, encoder))
    raise UsageError(f"--max-memory {human_bytes(options.max_memory)}: one thread needs about {least} for this model")


def run(conversion: Conversion) -> dict[str, Any]:
    """Write OUT; returns ders.json's content. On any error OUT does not come to be."""
    source, plan, options = conversion.source, conversion.plan, conversion.options
    check_space(conversion.out, conversion.totals()["output_bytes"] - plan.stream_bound, options)
    codecs = json.dumps([unit.codec.config for unit in plan.units])  # a source may have a say in them
    mark = fingerprint(source, conversion.recipe, options, conversion.base)
    mark["codecs"] = hashlib.sha256(codecs.encode()).hexdigest()
    mark["calibration"] = json.dumps(conversion.calibration, sort_keys=True)
    conversion.check_unchanged()  # so the mark is of what was opened
    with begin(conversion.out, options, mark) as folder:
        if folder is None:
            return read_manifest(conversion.out)
        total = plan.expert_bytes + sum(spec.nbytes for spec in source.copied.values())
        with shown(f"writing {conversion.out.name}", total, options.quiet) as progress:
            job = partial(_shard, conversion, folder, hashlib.sha256(json.dumps(mark).encode()).hexdigest())
            results = options.run_shards(job, len(plan.shards), folder, options.jobs, progress)
        manifest = _write_rest(conversion, folder, results, mark["carried"])
        conversion.check_unchanged()
        publish(folder, conversion.out, options)
    return manifest


def _write_rest(
    conversion: Conversion, folder: Path, results: list[dict[str, Any]], hashes: dict[str, str]
) -> dict[str, Any]:
    """Everything but the weight files; returns ders.json's content."""
    source = conversion.source
    copy_carried(source, folder, hashes)
    manifest = describe(
        source,
        conversion.recipe,
        conversion.plan,
        results,
        lambda path: file_hash(folder / path.name),
        conversion.calibration,
    )
    write_file(folder / "config.json", config_text(source))
    if len(results) > 1:
        by_name = {
            name: file
            for file, result in zip(file_names(len(results)), results, strict=True)
            for name in result["hashes"]
        }
        write_file(folder / INDEX, index_text(by_name, {"total_size": sum(result["bytes"] for result in results)}))
    write_file(folder / MANIFEST, manifest_text(manifest, conversion.manifest_bytes))
    return manifest


def fingerprint(source: Source, recipe: Recipe, options: Options, base: Base | None = None) -> dict[str, Any]:
    """What must be the same for a run to be continued; a dictionary's items are named where they differ."""
    files = {}
    for number, folder in enumerate((*source.folders, *(base.folders if base else ()))):
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name.endswith(MARKED):
                stat = path.stat()
                files[f"{number}:{path.name}" if number else path.name] = [stat.st_size, stat.st_mtime_ns]
    headers = [header.text for header in source.reader.headers.values()]
    return {
        "version of ders": __version__,
        "recipe": recipe.model_dump(mode="json"),
        "carried": carried_hashes(source),
        "source": files | {"headers": hashlib.sha256(repr(headers).encode()).hexdigest()},
        "shard size": str(options.max_shard_bytes),
        "upcycling": json.dumps(source.upcycling),
        "order of neurons (--align)": _orders_digest(source),
    }


def _orders_digest(source: Source) -> str:
    """SHA-256 of the orders in which experts' neurons are read."""
    digest = hashlib.sha256()
    for name in source.aligned:
        for chunk in source.chunks(name):
            digest.update(name.encode() + chunk.tobytes())
    return digest.hexdigest()


def _shard(conversion: Conversion, folder: Path, run: str, number: int, progress: Progress) -> dict[str, Any]:
    """Write one shard, or what the last run left to do of it; its result: {"run", "hashes", "groups", "sizes", "bytes"}.

    `run` names the fingerprint: on a cluster a job that was given up may still end, and write its record beside our shard.
    """
    source, options, shard = conversion.source, conversion.options, conversion.plan.shards[number]
    path, record = folder / shard.file, folder / f"{OWN}{shard.file}.json"
    if options.resume and (result := _finished(options, path, record, run)):
        progress.advance(_work(source, shard))
        _let_go(source, shard)
        return result
    journal = folder / f"{OWN}{shard.file}.journal"
    writer = ShardWriter(path, shard.fixed, shard.appended, b"", shard.slices, journal, options.resume)
    try:
        spools = {name: writer.spool(number) for number, name in enumerate(shard.appended)}
        tasks = []
        for name in shard.copied:
            tasks.append(([name], partial(_copy, source, writer, name, progress)))
        for unit in shard.units:
            own = {name: spools[name] for name, spec in unit.parts.items() if spec is None}
            tasks.append((source.tensors_of(unit.group), partial(_convert, conversion, unit, writer, own, progress)))
        entries = _in_file_order(source, tasks, options.jobs)[len(shard.copied) :]
        for name in shard.guards:
            writer.write(name, 0, np.frombuffer(GUARD_TEXT, np.uint8))
        for name, spool in spools.items():
            writer.append_spool(name, spool)
        sizes = {name: writer.tensors[name].nbytes for name in shard.appended}
        hashes = writer.hashes()
        if isinstance(source, DersSource):
            _refuse_damaged(source, shard, hashes)
        result = {"run": run, "hashes": hashes, "groups": entries, "sizes": sizes, "bytes": writer.nbytes}
        conversion.check_unchanged()
        write_file(
            record, json.dumps(result).encode()
        )  # before the shard has its name: a shard without a record is none
        writer.close()
    except BaseException:
        writer.abandon()
        raise
    options.target.put(path)
    journal.unlink(missing_ok=True)
    return result


def _refuse_damaged(source: DersSource, shard: ShardPlan, hashes: dict[str, list[str]]) -> None:
    """Raise CheckpointError where a copied tensor is not what the source's ders.json notes."""
    for name in shard.copied:
        if hashes[name] != source.manifest["tensors"][name]:
            raise CheckpointError(
                f"{name}: its bytes do not have the hash in ders.json; {source.reader.address} is damaged"
            )


def _finished(options: Options, path: Path, record: Path, run: str) -> dict[str, Any] | None:
    """The result of a shard that an earlier attempt of this run finished; one that it had not sent yet is sent."""
    if not record.exists() or (result := json.loads(record.read_text())).get("run") != run:
        return None
    if path.exists() and not options.target.has(path):
        options.target.put(path)
    return result if options.target.has(path) else None


def _let_go(source: Source, shard: ShardPlan) -> None:
    """Nothing of a finished shard will be read."""
    for name in shard.copied:
        source.reader.done(name)
    for unit in shard.units:
        source.done(unit.group, range(len(unit.group.members)))


def _work(source: Source, shard: ShardPlan) -> int:
    """Bytes read for a shard, as progress counts them."""
    experts = sum(TensorSpec(u.group.shape, u.group.dtype).nbytes * len(u.group.members) for u in shard.units)
    return experts + sum(source.copied[name].nbytes for name in shard.copied)


def _in_file_order(source: Source, tasks: Sequence[tuple[list[str], Callable[[], Any]]], jobs: int) -> list[Any]:
    """Run tasks, each given with the source's tensors that it reads, in the order in which these stand; results as given."""
    order = sorted(range(len(tasks)), key=lambda number: source.position(tasks[number][0]))

    def ahead(place: int) -> None:
        for name in tasks[order[place]][0]:
            if name in source.reader.places:
                source.reader.expect(name)

    results = local.run([tasks[number][1] for number in order], jobs, ahead)
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _copy(source: Source, writer: ShardWriter, name: str, progress: Progress) -> None:
    key, at = f"copied {name}", 0
    if key in writer.finished:
        progress.advance(source.copied[name].nbytes)
    else:
        for chunk in source.chunks(name):
            writer.write(name, at, chunk)
            at += chunk.nbytes
            progress.advance(chunk.nbytes)
        writer.finish(key, [name])
    source.reader.done(name)


def _convert(
    conversion: Conversion, unit: Unit, writer: ShardWriter, spools: dict[str, Path], progress: Progress
) -> dict[str, Any]:
    """A group's entry for ders.json: from the journal if it is written already."""
    source, group, key = conversion.source, unit.group, f"group {unit.group.name}"
    if key in writer.finished and all(writer.spooled(name, spool) for name, spool in spools.items()):
        progress.advance(TensorSpec(group.shape, group.dtype).nbytes * len(group.members))
        source.done(group, range(len(group.members)))
        return writer.finished[key]
    seed, encoder = conversion.recipe.seed, conversion.encoder
    entry = convert_group(source, conversion.base, seed, unit, writer, spools, progress, encoder)
    writer.finish(key, [name for name, spec in unit.parts.items() if spec is not None], entry)
    return entry
