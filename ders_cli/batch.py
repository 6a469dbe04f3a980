"""`ders compress --batch`: one model after another, with one recipe, in one process.

    list or glob -> models and their outputs, all different -> per model: skip, resume or convert -> table

The same command again goes on where the last one stopped: an output that is complete, of this recipe and of this model,
is skipped, an unfinished one is resumed. A model that fails is noted, and the next one's turn comes.
"""

import glob
import os
import shlex
import sys
import time
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from . import convert
from .base import Base, DenseBase
from .checkpoint.manifest import MANIFEST, is_ders
from .conversion_command import SCHEMA, choose_recipe, convert_model, finished
from .errors import DersError, Interrupted, UsageError, in_words
from .layouts import ExpertGroup
from .options import RunOptions
from .output import REPLACED, Options, is_untidy, place_output
from .recipe import Recipe
from .remote.address import is_remote, normal, open_store
from .report import human_bytes, print_json, print_table, say, say_traceback
from .source import DersSource, Source, open_source

FAILED, INTERRUPTED = 1, 130  # exit codes; each model's own is in the table


@dataclass(frozen=True)
class Job:
    """One model of a batch, and where its output goes."""

    model: str
    out: Path
    options: Options

    @property
    def output(self) -> str:
        return self.options.target.shown(self.out)


def run_batch(
    command: str, batch: str, output: str | None, fields: dict[str, Any], recipe_file: str | None, run: RunOptions
) -> int:
    """Convert every model of a list or a glob; returns the exit code. `output`: a folder for all of them."""
    recipe, ending = choose_recipe(fields, recipe_file)
    jobs = place_all(read_entries(batch), output, ending, run.options())
    results: list[dict[str, Any]] = []
    try:
        for number, job in enumerate(jobs, 1):
            begin, named = time.monotonic(), {"model": job.model, "output": job.output}
            results.append(
                named | {"seconds": 0.0} | _failure("interrupted; the same command goes on here", INTERRUPTED)
            )
            found = _one(command, job, recipe, run)
            results[-1] = named | {"seconds": round(time.monotonic() - begin, 2)} | found
            if not run.quiet or found["exit_code"]:
                say(f"{number}/{len(jobs)} {job.model}: {_state(results[-1])}")
    except Interrupted:
        say(f"{len(results)}/{len(jobs)} {results[-1]['model']}: interrupted")
        with suppress(OSError):  # Ctrl-C may have ended whoever reads stdout
            _report(command, results, run)
            sys.stdout.flush()
        os._exit(INTERRUPTED)  # worker threads may still hold blocks; there is nothing to save
    _report(command, results, run)
    return FAILED if any(result["exit_code"] for result in results) else 0


# --- which models, and where to ---


def read_entries(batch: str) -> list[tuple[str, str | None]]:
    """(model, output or None) of each line of a file, or of each plain checkpoint that a glob finds. Raises UsageError.

    A line is read as a shell reads it: quotes, # comments. A glob leaves out what ders has written beside the models.
    """
    if glob.has_magic(batch) and not Path(batch).exists():
        folders = [Path(path) for path in sorted(glob.glob(os.path.expanduser(batch)))]
        folders = [path for path in folders if path.suffix not in (".partial", REPLACED)]
        models = [path for path in folders if (path / "config.json").is_file()]
        if found := [(str(path), None) for path in models if not is_ders(path)]:
            return found
        raise UsageError(f"--batch {batch}: no folder with a config.json, DeRS checkpoints aside")
    try:
        lines = Path(batch).read_text().splitlines()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise UsageError(
            f"--batch {batch}: expected a text file with a model a line, or a glob in quotes such as 'models/*'"
        ) from None
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UsageError(f"{batch}, line {number}: {error}") from None
        if len(words) > 2:
            raise UsageError(f"{batch}, line {number}: expected MODEL [OUTPUT], found {len(words)} words; quote spaces")
        if words:
            entries.append((words[0], words[1] if len(words) == 2 else None))
    if not entries:
        raise UsageError(f"--batch {batch}: names no model")
    return entries


def place_all(entries: list[tuple[str, str | None]], folder: str | None, ending: str, options: Options) -> list[Job]:
    """Where every output goes, all of them different and none in place of a model. Raises UsageError.

    A model's own `output`, under `folder` unless it is absolute; else its name with `ending`, in `folder` or beside it.
    """
    # what an earlier batch left unfinished is continued
    options = options if options.overwrite else replace(options, resume=True)
    # refused here, before anything runs, if it is no address
    entries = [(open_store(model).address if is_remote(model) else model, output) for model, output in entries]
    models = {normal(model): model for model, _ in entries}
    jobs: dict[str, Job] = {}
    for model, output in entries:
        if folder is not None and not (output and is_remote(output)):
            output = os.path.join(folder, output or place_output(None, model, ending, options)[0].name)
        job = Job(model, *place_output(output, model, ending, options))
        if other := jobs.get(job.output):
            raise UsageError(
                f"{job.output}: the output of both {other.model} and {model}; the list's second column names another"
            )
        for place, other in jobs.items():
            if f"{place}/".startswith(f"{job.output}/") or job.output.startswith(f"{place}/"):
                raise UsageError(
                    f"{job.output}: the output of {model}, and {place} that of {other.model}: one in the other"
                )
        for place, other in models.items():
            if place == job.output:
                raise UsageError(f"{job.output}: the output of {model}, and itself a model of this batch")
            if place.startswith(f"{job.output}/"):
                raise UsageError(f"{job.output}: the output of {model}, and {other} of this batch stands in it")
        jobs[job.output] = job
    return list(jobs.values())


# --- one model ---


def _one(command: str, job: Job, recipe: Recipe, run: RunOptions) -> dict[str, Any]:
    """The document of one model with `exit_code` and `skipped`, or `exit_code` and `error`."""
    try:
        document = _already(command, job, recipe, run)
        skipped = document is not None
        if not skipped:
            document = convert_model(command, job.model, job.out, job.options, recipe, run)
        return document | {"exit_code": 0, "skipped": skipped}
    except DersError as error:
        return _failure(str(error), error.exit_code)
    except MemoryError:
        return _failure("out of memory; fewer --jobs need less", FAILED)
    except OSError as error:
        return _failure(in_words(error), FAILED)
    except Exception as error:  # a fault of ders with one model is no reason to leave out the others
        say_traceback()
        return _failure(f"{type(error).__name__}: {error}", FAILED)


def _failure(message: str, code: int) -> dict[str, Any]:
    return {"exit_code": code, "error": {"message": message, "exit_code": code}}


def _already(command: str, job: Job, recipe: Recipe, run: RunOptions) -> dict[str, Any] | None:
    """The document of an output that an earlier run completed, None if there is none. Raises UsageError at another one."""
    if job.options.overwrite or is_remote(job.output) or not is_ders(job.out) or is_untidy(job.out):
        return None
    with ExitStack() as stack:
        source = stack.enter_context(open_source(job.model, recipe.shared, run.scratch))
        done = stack.enter_context(DersSource(job.out))
        conversion = convert.prepare(
            source, recipe, job.out, replace(job.options, overwrite=True)
        )  # nothing is written
        stack.enter_context(closing(conversion.base) if conversion.base else nullcontext())
        remedy = "--overwrite replaces it, the list's second column names another place"
        if done.manifest["recipe"] != conversion.recipe.model_dump(mode="json"):
            raise UsageError(f"{job.output}: was made with another recipe; {remedy}")
        if _newest(job, source, conversion.base) > (job.out / MANIFEST).stat().st_mtime_ns:
            raise UsageError(f"{job.output}: is older than {job.model} or its base; {remedy}")
        if done.manifest["source"] != source.form() or not _same_experts(source, done):
            raise UsageError(f"{job.output}: was made of another model than {job.model}; {remedy}")
        return finished(command, conversion, done.manifest)


def _newest(job: Job, source: Source, base: Base | None) -> int:
    """When the last weight file or config of what is read here was changed, in ns; 0 where all of it is remote."""
    folders = [] if is_remote(job.model) else list(source.folders)
    if isinstance(base, DenseBase) and not is_remote(base.address):
        folders += base.folders
    return max((p.stat().st_mtime_ns for folder in folders for p in folder.iterdir() if _is_input(p)), default=0)


def _is_input(path: Path) -> bool:
    return path.name.endswith(convert.MARKED) and path.is_file()


def _same_experts(source: Source, done: DersSource) -> bool:
    """The first and the last expert have the hashes that ders.json notes: names and shapes are equal in all fine-tunes."""
    first, last = source.groups[0], source.groups[-1]
    for group, member in ((first, 0), (last, len(last.members) - 1)):
        if done.entry(group)["members"][member]["source_hash"] != _hash(source, group, member):
            return False
    return True


def _hash(source: Source, group: ExpertGroup, member: int) -> str:
    digest = blake3()
    for rows in source.blocks(group):
        digest.update(np.ascontiguousarray(source.read(group, member, rows)).reshape(-1).view(np.uint8))
    return digest.hexdigest()


# --- what a person sees ---


def _state(result: dict[str, Any]) -> str:
    if result["exit_code"]:
        return result["error"]["message"]
    return (
        "already done"
        if result["skipped"]
        else f"{'planned' if result['dry_run'] else 'done'}, {result['seconds']:.1f} s"
    )


def _report(command: str, results: list[dict[str, Any]], run: RunOptions) -> None:
    if run.as_json:
        print_json({"schema": SCHEMA, "command": command, "batch": results})
    elif run.quiet:
        print("\n".join(result["output"] for result in results if not result["exit_code"]))
    else:
        print_table(
            "", ["model", "exit code", "output, or error", "before", "after", "seconds"], list(map(_row, results))
        )


def _row(result: dict[str, Any]) -> list[str]:
    code, seconds = str(result["exit_code"]), f"{result['seconds']:.1f}"
    if result["exit_code"]:
        return [result["model"], code, result["error"]["message"], "", "", seconds]
    plan = result["plan"]
    kept = result.get("output_bytes", plan["output_bytes"])
    at_most = "" if "output_bytes" in result or plan["exact"] else "at most "
    before, after = human_bytes(plan["source_bytes"]), at_most + human_bytes(kept)
    return [result["model"], code, result["output"], before, after, "already done" if result["skipped"] else seconds]
