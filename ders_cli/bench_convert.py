"""How fast conversions are here, and how fast they could be: each beside its own I/O done alone, and its computing alone.

Of every command (compress, restore, verify, verify --against) and every --delta three things are timed, in this process,
one after another in rounds whose order turns, and their medians reported:

    whole    the command's own work from opening the checkpoints to the renamed folder, start-up and printing aside
    twin     its reads and writes without anything in between (bench_traffic.py), recorded in a run of their own
    compute  the same work with its files in memory and its output thrown away (bench_memory.py); none if they don't fit

`ratio` is twin over whole: 1 means that the conversion takes no longer than its I/O. Rates are 1e9 bytes of the plain
model's expert weights a second; CPU seconds are the process's, of all its threads, user and system.

Files are in the page cache, where memory is large enough for that; with `cold` the input's pages are dropped before every
run, and two more things are timed: reading the input's files from front to back, and writing as many bytes as the output
has into a new file with one fsync. `of_limit` is the slower of the two over the whole: what the disk alone would take.

`stages` (bench_stages.py) says what each part of the work costs by itself.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from . import convert
from .bench_memory import Held, without_disk
from .bench_model import Shape, make_model
from .bench_stages import stages
from .bench_traffic import Counted, Twin, recorded
from .checkpoint.tensor import TensorSpec
from .errors import DersError, UsageError
from .output import Options
from .recipe import Recipe, make_recipe
from .report import human_bytes
from .restore import require_ders, restore
from .source import Source, open_source
from .verify import Bounds, verify

DELTAS = ("exact", "int8", "int4", "int1", "drop0.9", "ternary0.02", "top0.1", "2:4", "rank16")
TINY = Shape(experts=4, hidden=256, inner=512)
PIECE = 4 << 20  # bytes of one read or write of the disk's own rates
STARTING = 1 << 20
TOKENS = 16  # of verify --against, as the command's default

Opened = Callable[[Source], Source]  # what is done with a source when it has been opened
Work = Callable[[Path, Opened], None]  # one command: writes the folder


@dataclass(frozen=True)
class Times:
    """Medians of the rounds."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Row:
    """One command with one --delta; see the module's text. Bytes of reads and writes are as the kernel counts them."""

    command: str
    delta: str
    bytes: int  # of the plain model's experts
    whole: Times
    twin: Times
    compute: Times | None
    read: int
    written: int
    twin_read: int
    twin_written: int
    read_alone: Times | None = None  # cold only
    write_alone: Times | None = None

    @property
    def ratio(self) -> float:
        return self.twin.wall_s / self.whole.wall_s

    @property
    def missed(self) -> str:
        """What the twin left out, if it is more than 1 % and what libraries read as they start; else ""."""
        pairs = {"read": (self.read, self.twin_read), "written": (self.written, self.twin_written)}
        said = [f"{b:,} of {a:,} bytes {way}" for way, (a, b) in pairs.items() if abs(a - b) > 0.01 * a + STARTING]
        return f"{self.command}, {self.delta}: the twin has {' and '.join(said)}" if said else ""

    @property
    def of_limit(self) -> float | None:
        alone = [times.wall_s for times in (self.read_alone, self.write_alone) if times]
        return max(alone) / self.whole.wall_s if alone else None


class ConvertBench:
    """Measures one checkpoint, or a synthetic one of `gigabytes`, with everything it writes in a new folder in `scratch`.

    Use with `with`: the folder is removed at the end. Raises UsageError for what cannot be measured.
    """

    def __init__(
        self,
        model: Path | None,
        deltas: tuple[str, ...],
        jobs: int,
        rounds: int,
        gigabytes: float,
        scratch: Path | None,
        cold: bool,
        quick: bool,
    ):
        self.recipes = {delta: make_recipe({"delta": delta}) for delta in deltas}
        self.jobs, self.rounds, self.cold, self.quick = jobs, 1 if quick else rounds, cold, quick
        self.synthetic = model is None
        parent = scratch or (model.resolve().parent if model else Path(tempfile.gettempdir()))
        if not parent.is_dir():
            raise UsageError(f"--scratch {parent}: no such folder")
        self.disk = disk_of(parent)
        if cold and (not hasattr(os, "posix_fadvise") or self.disk.startswith("tmpfs")):
            raise UsageError(f"--cold: {self.disk} keeps its files in memory; --scratch names a folder on a disk")
        self.folder = Path(tempfile.mkdtemp(prefix="ders-bench-", dir=parent)).resolve()
        try:
            self.tiny = self.folder / "tiny"
            make_model(self.tiny, 0, TINY)
            self.model = model.resolve() if model else self.tiny if quick else self.folder / "model"
            if model is None and not quick:
                self._check_room(1e9 * gigabytes)
                make_model(self.model, gigabytes)
            with open_source(self.model) as source:
                if hasattr(source, "manifest"):
                    raise UsageError(f"{self.model}: is a DeRS checkpoint; bench convert measures from a plain one")
                shapes = [(g.shape, g.dtype, len(g.members)) for g in source.groups]
            self.bytes = sum(TensorSpec(shape, dtype).nbytes * members for shape, dtype, members in shapes)
            self._check_room(3 * self.bytes)  # its DeRS form, and restored twice
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ConvertBench":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_room(self, needed: float) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise DersError(
                f"{self.folder.parent}: {human_bytes(needed)} needed, {human_bytes(free)} free; --scratch names another disk"
            )

    def close(self) -> None:
        for _ in range(20):  # threads of a run that was interrupted may still be writing
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.folder.exists():
                return
            time.sleep(0.1)

    def start_up(self) -> Times:
        """A fresh `ders compress` of a model of a few megabytes: what starting costs, whatever the model."""
        delta = next(iter(self.recipes))
        command = [sys.executable, "-m", "ders_cli", "compress", self.tiny, "--delta", delta, "-q", "--overwrite", "-o"]
        call = partial(
            subprocess.run, [*map(str, command), str(self.folder / "started")], check=True, stdout=subprocess.DEVNULL
        )
        found = [_timed(call, _cpu_of_children) for _ in range(max(2, self.rounds))][1:]  # the first fills caches
        return _medians(found)

    def rows(self, delta: str) -> Iterator[Row]:
        """The four commands with one codec. Code is compiled, and loaded, on a small model first."""
        recipe = self.recipes[delta]
        self._warm(recipe)
        packed, plain = self.folder / "packed", self.folder / "plain"
        yield self._row("compress", recipe, [self.model], packed, partial(_compress, self.model, recipe, self.jobs))
        yield self._row("restore", recipe, [packed], plain, partial(_restore, packed, self.jobs))
        shutil.rmtree(plain)
        for command, inputs in (("verify", [packed]), ("verify --against", [packed, self.model])):
            yield self._row(command, recipe, inputs, None, partial(_verify, inputs, self.jobs))
        shutil.rmtree(packed)

    def stages(self, delta: str) -> dict[str, float]:
        """CPU seconds for 1e9 bytes of each part of a conversion (bench_stages.py)."""
        with open_source(self.model) as source:
            stages(source, self.recipes[delta], self.folder)  # compiles what only is called here
            return stages(source, self.recipes[delta], self.folder)

    def _warm(self, recipe: Recipe) -> None:
        packed, plain = self.folder / "warm", self.folder / "warm-plain"
        _compress(self.tiny, recipe, self.jobs, packed, _as_is)
        _restore(packed, self.jobs, plain, _as_is)
        _verify([packed, self.tiny], self.jobs, plain, _as_is)
        shutil.rmtree(packed)
        shutil.rmtree(plain)

    def _row(self, command: str, recipe: Recipe, inputs: list[Path], made: Path | None, work: Work) -> Row:
        """Record the command once, which makes `made`; then time it, its twin and its computing in turn."""
        kept = made or self.folder / "nothing"
        with recorded(*inputs, self.folder) as operations:
            work(kept, _as_is)
        out, held = self.folder / "out", Held(inputs) if Held.fits(inputs) else None
        twin = Twin(operations, kept, out)
        runs: dict[str, Callable[[], None]] = {"whole": partial(work, out, _as_is), "twin": twin.run}
        if held:
            runs["compute"] = partial(_computed, work, out, held)
        if self.cold:
            runs["read_alone"] = partial(_read_through, inputs)
            if made:
                size = sum(path.stat().st_size for path in made.iterdir())
                runs["write_alone"] = partial(_write_through, self.folder / "written", size)
        found: dict[str, list[Times]] = {name: [] for name in runs}
        moved: dict[str, Counted] = {}
        for number in range(self.rounds):
            names = list(runs)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if self.cold:
                    drop_pages(inputs)
                before = Counted.now()
                found[name].append(_timed(runs[name]))
                moved[name] = Counted.now().since(before)
                shutil.rmtree(out, ignore_errors=True)
                (self.folder / "written").unlink(missing_ok=True)
        whole, other = moved["whole"], moved["twin"]
        counts = (whole.read, whole.written, other.read, other.written)
        times = {name: _medians(own) for name, own in found.items()}
        return Row(
            command,
            recipe.delta,
            self.bytes,
            times["whole"],
            times["twin"],
            times.get("compute"),
            *counts,
            times.get("read_alone"),
            times.get("write_alone"),
        )


# --- the commands, as their own functions do them


def _compress(model: Path, recipe: Recipe, jobs: int, out: Path, opened: Opened) -> None:
    with opened(open_source(model)) as source:
        convert.run(convert.prepare(source, recipe, out, Options(jobs)))


def _restore(packed: Path, jobs: int, out: Path, opened: Opened) -> None:
    with opened(open_source(packed)) as source:
        restore(require_ders(source, packed), out, Options(jobs))


def _verify(folders: list[Path], jobs: int, out: Path, opened: Opened) -> None:
    sources = [opened(open_source(folder)) for folder in folders]
    try:
        report = verify(sources[0], *([*sources[1:], None][:1]), Bounds(), None, True, TOKENS, 0, jobs, True)
        if report.findings:
            raise DersError(f"{folders[0]}: verify finds what it should not: {report.findings[0]}")
    finally:
        for source in sources:
            source.close()


def _as_is(source: Source) -> Source:
    return source


def _computed(work: Work, out: Path, held: Held) -> None:
    with without_disk(held, out):
        work(out, held.lend)


# --- the disk


def drop_pages(folders: list[Path]) -> None:
    """Let the system forget what it has read of the folders' files."""
    for path in (path for folder in folders for path in folder.iterdir() if path.is_file()):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _read_through(folders: list[Path]) -> None:
    buffer = bytearray(PIECE)
    for path in sorted(path for folder in folders for path in folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _write_through(path: Path, size: int) -> None:
    piece = memoryview(np.random.default_rng(0).bytes(PIECE))
    with path.open("wb", buffering=0) as file:
        os.truncate(path, size)
        for at in range(0, size, PIECE):
            file.write(piece[: size - at])
        os.fsync(file.fileno())


def disk_of(folder: Path) -> str:
    """File system and device of a folder, as /proc/mounts has them: `ext4 on /dev/sda1`."""
    mounts = Path("/proc/mounts")
    found, best = "unknown file system", -1
    for line in mounts.read_text().splitlines() if mounts.exists() else []:
        device, point, kind, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) >= best:
            found, best = f"{kind} on {device}", len(point)
    return found


# --- the clock


def _timed(call: Callable[[], object], cpu: Callable[[], float] = time.process_time) -> Times:
    wall, before = time.perf_counter(), cpu()
    call()
    return Times(time.perf_counter() - wall, cpu() - before)


def _cpu_of_children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _medians(found: list[Times]) -> Times:
    return Times(median(times.wall_s for times in found), median(times.cpu_s for times in found))
