"""An output folder: written as OUT.partial, complete under its own name, never half of both."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.manifest import MANIFEST, write_file
from .checkpoint.reader import INDEX
from .checkpoint.writer import fsync_folder
from .engines import local
from .errors import DersError, UsageError
from .report import Progress, human_bytes

RunShards = Callable[[Callable[[int, Progress], Any], int, Progress], list[Any]]  # (job, count, progress) -> results

# What a run keeps for itself in OUT.partial. Files whose names begin with a dot are never carried from a source.
OWN = ".ders-"
MARK = OWN + "plan.json"

# Weights in forms that ders does not read; they are left behind, and everything else beside the shards is carried.
NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
LEFT_BEHIND = (*NOT_READ, ".safetensors", ".index.json", ".partial")


@dataclass(frozen=True)
class Options:
    """How a command runs; none of it changes a byte of the weights, and only the shard size their files."""

    jobs: int = 1
    max_shard_bytes: int = 5_000_000_000
    max_memory: int | None = None
    overwrite: bool = False
    resume: bool = False
    quiet: bool = True
    run_shards: RunShards = local.run_shards  # the engine: where the jobs of output shards run


def carry(folder: Path) -> list[Path]:
    """Files beside the weights that go along unchanged: tokenizer, generation settings, licence, ..."""
    written = {"config.json", MANIFEST, INDEX}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in written
        and not path.name.startswith(".")
        and not path.name.endswith(LEFT_BEHIND)
    ]


def left_behind(folder: Path) -> list[str]:
    """Names beside the weights that are not carried: folders, and weights in forms that ders does not read."""
    return [
        path.name + "/" * path.is_dir()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (path.is_dir() or path.name.endswith(NOT_READ))
    ]


def check_space(out: Path, needed: int) -> None:
    """Raise DersError if the disk has not `needed` bytes free."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise DersError(f"{parent}: {human_bytes(needed)} needed, {human_bytes(free)} free")


def refuse_occupied(out: Path, options: Options, *inputs: Path) -> None:
    """Raise UsageError if something stands where the output goes and may not be replaced; an input never may."""
    partial = partial_of(out)
    for path in (path.resolve() for path in inputs):
        for place in (out, partial):
            if place == path or place in path.parents:
                raise UsageError(f"{place}: the input {path} stands there; -o names another place")
    if out == Path.cwd() or out in Path.cwd().parents:
        raise UsageError(f"{out}: is the current folder or above it; -o names another place")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file stands here; expected a folder to write")
    if out.exists() and any(out.iterdir()):
        if not options.overwrite:
            raise UsageError(f"{out}: exists and is not empty; --overwrite replaces it, -o names another place")
        if not (out / "config.json").is_file():
            raise UsageError(
                f"{out}: has no config.json, so --overwrite does not take it for a checkpoint; remove it yourself"
            )
    if partial.exists() or partial.is_symlink():
        if partial.is_symlink() or not partial.is_dir() or _is_strange(partial):
            raise UsageError(f"{partial}: is no unfinished run of ders; remove it yourself, or -o names another place")
        if not options.resume and not options.overwrite:
            raise UsageError(
                f"{partial}: an unfinished run stands here; --resume continues it, --overwrite starts again"
            )


def _is_strange(partial: Path) -> bool:
    """A folder that no run of ders has begun."""
    return not (partial / MARK).is_file() and any(not path.name.startswith(OWN) for path in partial.iterdir())


def partial_of(out: Path) -> Path:
    """Where an output stands until it is complete."""
    return out.with_name(out.name + ".partial")


def begin(out: Path, options: Options, fingerprint: dict[str, str]) -> Path:
    """An empty OUT.partial, or the one to resume if it was begun with the same fingerprint; else UsageError."""
    folder = partial_of(out)
    if folder.exists() and options.resume:
        found = _mark(folder)
        differs = [key for key in fingerprint if found.get(key) != fingerprint[key]]
        if differs:
            raise UsageError(f"{folder}: was begun with another {' and '.join(differs)}; --overwrite starts again")
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_file(folder / MARK, json.dumps(fingerprint).encode())
    return folder


def _mark(folder: Path) -> dict[str, str]:
    """The fingerprint of an unfinished run; empty if it cannot be read."""
    try:
        found = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def copy_file(path: Path, to: Path) -> None:
    """Copy a file's bytes, durably."""
    shutil.copyfile(path, to)
    with to.open("rb") as file:
        os.fsync(file.fileno())


def publish(folder: Path, out: Path) -> None:
    """Remove what only the run needed and rename OUT.partial to OUT; an OUT that may be replaced goes first."""
    for left in [*folder.glob(OWN + "*"), *folder.glob("*.partial")]:
        left.unlink(missing_ok=True)
    fsync_folder(folder)
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
    fsync_folder(out.parent)
