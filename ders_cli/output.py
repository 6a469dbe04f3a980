"""An output folder: written as OUT.partial, complete under its own name, never half of both."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint.files import of_file
from .checkpoint.lock import locked, refuse_locked
from .checkpoint.manifest import MANIFEST, write_file
from .checkpoint.reader import INDEX, LEFT_BEHIND, NOT_READ
from .checkpoint.writer import fsync_folder
from .engines import local
from .errors import DersError, UsageError
from .remote.address import is_remote, local_path, name_of
from .remote.target import Target, Upload, open_target
from .report import Progress, human_bytes

# (job, count, OUT.partial, threads of a job, progress) -> results in order
RunShards = Callable[[Callable[[int, Progress], Any], int, Path, int, Progress], list[Any]]

# What a run keeps for itself in OUT.partial. Files whose names begin with a dot are never carried from a source.
OWN = ".ders-"
MARK = OWN + "plan.json"
LOCK = OWN + "lock"
REPLACED = (
    ".ders-replaced"  # OUT.ders-replaced: the old output, between the two renames that put the new one in its place
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
    run_shards: RunShards = local.run_shards  # the engine: where the jobs of output shards run
    target: Target = Target()  # where finished files go
    scratch: Path | None = None  # for what is fetched and what is to be sent; None: the system's temporary folder


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


def place_output(output: str | None, model: str | Path, ending: str, options: Options) -> tuple[Path, Options]:
    """The folder to write, and the options with where it goes. None: beside the model, or here if that is remote."""
    if output is not None and is_remote(output):
        out, target = open_target(output, MARK, options.scratch)
        return out, replace(options, target=target)
    if output is not None:
        return local_path(output).resolve(), options
    beside = Path(name_of(model)) if is_remote(model) else local_path(model)
    return beside.absolute().with_name(beside.absolute().name + ending).resolve(), options


def output_bytes(out: Path, options: Options) -> int:
    """Bytes of all files of a finished output."""
    if isinstance(options.target, Upload):
        return options.target.size()
    return sum(path.stat().st_size for path in out.iterdir())


def check_space(out: Path, needed: int, options: Options) -> None:
    """Raise DersError if the disk has not `needed` bytes free. An upload holds one shard, its streams twice.

    What an unfinished run has taken counts as free: it is finished already, or will be removed.
    """
    if isinstance(options.target, Upload):
        needed = min(needed, 2 * options.max_shard_bytes)
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    unfinished = 0
    for path in partial_of(out).glob("*"):
        with suppress(FileNotFoundError):
            unfinished += 512 * path.lstat().st_blocks
    free = shutil.disk_usage(parent).free + unfinished
    if needed > free:
        raise DersError(f"{parent}: {human_bytes(needed)} needed, {human_bytes(free)} free")


def refuse_occupied(out: Path, options: Options, *inputs: Path, addresses: Iterable[str] = ()) -> None:
    """Raise UsageError if something stands where the output goes and may not be replaced; an input never may."""
    if isinstance(options.target, Upload):
        options.target.refuse_occupied(options.overwrite, options.resume, addresses)
    for path in inputs:
        refuse_within(out, path, *(link for link in path.iterdir() if link.is_symlink()))
    if out == Path.cwd() or out in Path.cwd().parents:
        raise UsageError(f"{out}: is the current folder or above it; -o names another place")
    refuse_locked(partial_of(out), LOCK)
    _refuse_standing(out, options)


def refuse_within(out: Path, *inputs: Path) -> None:
    """Raise UsageError if something that is read stands where the output goes, by whatever links: it would be removed."""
    for path in inputs:
        real = path.resolve()
        for place in (out, partial_of(out), replaced_of(out)):
            if place == real or place in real.parents:
                shown = path if path.resolve() == path else f"{path} -> {real}"
                raise UsageError(f"{place}: the input {shown} stands there; -o names another place")


def _refuse_standing(out: Path, options: Options) -> None:
    """Raise UsageError if a folder of files stands at OUT or OUT.partial and may not be replaced or continued."""
    partial = partial_of(out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: a file stands here; expected a folder to write")
    tidying = options.resume and is_untidy(out) and not _begun(partial)
    if out.exists() and any(out.iterdir()) and not tidying:
        if not options.overwrite:
            raise UsageError(f"{out}: exists and is not empty; --overwrite replaces it, -o names another place")
        if not (out / "config.json").is_file():
            raise UsageError(
                f"{out}: has no config.json, so --overwrite does not take it for a checkpoint; remove it yourself"
            )
    _refuse_replaced(out, options)
    if partial.exists() or partial.is_symlink():
        if partial.is_symlink() or not partial.is_dir() or _is_strange(partial):
            raise UsageError(f"{partial}: is no unfinished run of ders; remove it yourself, or -o names another place")
        if _begun(partial) and not options.resume and not options.overwrite:
            where = partial if options.target.shown(out) == str(out) else options.target.shown(out)
            raise UsageError(f"{where}: an unfinished run stands here; --resume continues it, --overwrite starts again")


def _refuse_replaced(out: Path, options: Options) -> None:
    """Raise UsageError if OUT.ders-replaced is not what a killed run has put aside, or is and may not be removed."""
    replaced = replaced_of(out)
    if not replaced.exists() and not replaced.is_symlink():
        return
    explained = is_untidy(out) or _begun(partial_of(out))
    if replaced.is_symlink() or not replaced.is_dir() or not (explained or (replaced / "config.json").is_file()):
        raise UsageError(f"{replaced}: is no output that ders has put aside; remove it yourself")
    if not explained and not options.overwrite:
        raise UsageError(
            f"{replaced}: the output that a killed run was replacing; move it away, or let --overwrite remove it"
        )


def _begun(folder: Path) -> bool:
    """A run has left its mark: it can be resumed. One that was killed at once has not come to it."""
    return (folder / MARK).is_file()


def is_untidy(out: Path) -> bool:
    """The run that made OUT was killed when all was done but tidying up; --resume does that."""
    return (out / MARK).is_file()


def _is_strange(partial: Path) -> bool:
    """A folder that no run of ders has begun."""
    return not _begun(partial) and any(not path.name.startswith(OWN) for path in partial.iterdir())


def partial_of(out: Path) -> Path:
    """Where an output stands until it is complete."""
    return out.with_name(out.name + ".partial")


def replaced_of(out: Path) -> Path:
    """Where an output that is being replaced stands for a moment; a run killed in this moment leaves it there."""
    return out.with_name(out.name + REPLACED)


@contextmanager
def begin(out: Path, options: Options, fingerprint: dict[str, Any]) -> Iterator[Path | None]:
    """OUT.partial, which nobody else may write until the end of this: empty, or the one to resume. None: OUT is complete.

    Raises UsageError where the one to resume was begun with another fingerprint, LockedError where another run holds it.
    """
    folder = partial_of(out)
    options.target.make_room()
    with locked(folder, LOCK):
        _refuse_again(out, options, folder)
        if options.resume and is_untidy(out) and not _begun(folder):
            differs = _differences(_mark(out), fingerprint)
            if not differs or is_untidy(out):
                _leave_empty(folder)
                if differs:
                    raise UsageError(f"{out}: was made with another {differs}; --overwrite replaces it")
                _tidy(out)
                yield None
                return
            _refuse_again(out, options, folder)  # the run that made it was tidying up, and its mark is gone
        again = _begun(folder) and options.resume
        if again:
            if differs := _differences(_mark(folder), fingerprint):
                raise UsageError(f"{folder}: was begun with another {differs}; --overwrite starts again")
        else:
            _clear(folder)
            write_file(folder / MARK, json.dumps(fingerprint).encode())
        options.target.begin(folder / MARK, again)
        yield folder


def _refuse_again(out: Path, options: Options, folder: Path) -> None:
    """Another run may have ended since `refuse_occupied` looked; of this one nothing is left then."""
    try:
        _refuse_standing(out, options)
    except UsageError:
        _leave_empty(folder)
        raise


def _leave_empty(folder: Path) -> None:
    """Remove a folder in which there is nothing but the lock."""
    if [path.name for path in folder.iterdir()] == [LOCK]:
        (folder / LOCK).unlink()
        folder.rmdir()


def _differences(found: dict[str, Any], now: dict[str, Any]) -> str:
    """What of a fingerprint is another one than was found, in words; "" if all is the same."""
    words = []
    for key, value in now.items():
        old = found.get(key)
        if old == value:
            continue
        words.append(key)
        if isinstance(old, dict) and isinstance(value, dict):
            names = [name for name in {**old, **value} if old.get(name) != value.get(name)]
            shown = [f"{name}: {_cut(old.get(name))}, now {_cut(value.get(name))}" for name in names[:3]]
            words[-1] += f" ({'; '.join(shown)}{' ...' * (len(names) > 3)})"
    return " and ".join(words)


def _cut(value: Any) -> str:
    """As text of 80 characters at most."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _clear(folder: Path) -> None:
    """Remove what another run left, all but its mark, which the next one replaces: there is always one beside files."""
    for path in sorted(folder.iterdir()):  # first the journals, which speak of other files
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (MARK, LOCK):
            path.unlink()


def _mark(folder: Path) -> dict[str, Any]:
    """The fingerprint of an unfinished run; empty if it cannot be read."""
    try:
        found = json.loads((folder / MARK).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def copy_file(path: Path, to: Path) -> None:
    """Copy a file's bytes, durably."""
    shutil.copyfile(path, to)
    with of_file(to), to.open("rb") as file:
        os.fsync(file.fileno())


def publish(folder: Path, out: Path, options: Options) -> None:
    """Rename OUT.partial to OUT, and only then remove what the run kept for itself; an OUT that may be replaced goes last.

    Where the output is sent elsewhere, the upload is finished and nothing stays here.
    """
    for left in folder.glob("*.partial"):
        left.unlink(missing_ok=True)
    if isinstance(options.target, Upload):
        options.target.publish([path for path in sorted(folder.iterdir()) if not path.name.startswith(OWN)])
        _clear(folder)  # last its mark
        shutil.rmtree(out.parent)
        return
    fsync_folder(folder)
    replaced = replaced_of(out)
    if out.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        out.rename(replaced)
    folder.rename(out)
    fsync_folder(out.parent)
    _tidy(out)


def _tidy(out: Path) -> None:
    """Remove what is left of making a complete output: the one that it replaced, the run's own files, last its mark."""
    if replaced_of(out).exists():
        shutil.rmtree(replaced_of(out))
    for left in sorted(out.glob(OWN + "*"), key=lambda path: path.name == MARK):
        left.unlink(missing_ok=True)
