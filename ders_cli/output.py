"""An output folder: written as OUT.partial, complete under its own name, never half of both."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from .checkpoint.manifest import MANIFEST, write_file
from .checkpoint.reader import INDEX
from .checkpoint.writer import fsync_folder
from .errors import DersError, UsageError
from .report import human_bytes

MARK = "plan.json"
RESULT = ".result.json"

# Weights in forms that ders does not read; they are left behind, and everything else beside the shards is carried.
LEFT_BEHIND = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
    ".partial",
)


@dataclass(frozen=True)
class Options:
    """How a command runs; none of it changes a byte of the weights, and only the shard size their files."""

    jobs: int = 1
    max_shard_bytes: int = 5_000_000_000
    max_memory: int | None = None
    overwrite: bool = False
    resume: bool = False
    quiet: bool = True


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
    place = out.resolve()
    for path in (path.resolve() for path in inputs):
        if place == path or place in path.parents:
            raise UsageError(f"{out}: the input {path} stands there; -o names another place")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file stands here; expected a folder to write")
    if out.exists() and any(out.iterdir()):
        if not options.overwrite:
            raise UsageError(f"{out}: exists and is not empty; --overwrite replaces it, -o names another place")
        if not (out / "config.json").is_file():
            raise UsageError(
                f"{out}: is no checkpoint (it has no config.json), so --overwrite does not delete it; remove it yourself"
            )
    partial = out.with_name(out.name + ".partial")
    if partial.exists() and not options.resume and not options.overwrite:
        raise UsageError(f"{partial}: an unfinished run stands here; --resume continues it, --overwrite starts again")


def begin(out: Path, options: Options, fingerprint: dict[str, str]) -> Path:
    """An empty OUT.partial, or the one to resume: begun with the same fingerprint, else UsageError says what differs."""
    folder = out.with_name(out.name + ".partial")
    if folder.exists() and options.resume:
        found = json.loads((folder / MARK).read_text()) if (folder / MARK).exists() else {}
        differs = [key for key in fingerprint if found.get(key) != fingerprint[key]]
        if differs:
            raise UsageError(f"{folder}: was begun with another {' and '.join(differs)}; --overwrite starts again")
        return folder
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_file(folder / MARK, json.dumps(fingerprint).encode())
    return folder


def copy_file(path: Path, to: Path) -> None:
    """Copy a file's bytes, durably."""
    shutil.copyfile(path, to)
    with to.open("rb") as file:
        os.fsync(file.fileno())


def publish(folder: Path, out: Path) -> None:
    """Remove what only the run needed and rename OUT.partial to OUT; an OUT that may be replaced goes first."""
    for left in [*folder.glob("*" + RESULT), *folder.glob("*.partial"), *folder.glob("*.spool"), folder / MARK]:
        left.unlink(missing_ok=True)
    fsync_folder(folder)
    if out.exists():
        shutil.rmtree(out)
    folder.rename(out)
    fsync_folder(out.parent)
