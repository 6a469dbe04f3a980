"""Faults on purpose: every call on files has a number; at a given one the process is killed, or the call fails.

    python tests/faulty.py --count -- compress MODEL -o OUT -j 1
    python tests/faulty.py --fault kill:123 -- compress MODEL -o OUT -j 1

Calls that change files are numbered 1, 2, ...; reads have numbers of their own. Both only below --under (default: the
current folder), so that imports and caches don't count. With -j 1 the numbers are the same in every run. Faults:

    kill:N              SIGKILL before change N
    torn:N              half of write N, then SIGKILL; before any other change
    signal:SIGINT:N     a signal before change N, and the call goes on
    short:N[:on]        pwrite N writes half and says so; with `on` this one and all that follow
    errno:ENOSPC:N[:on] change N fails as the kernel would let it
    read-errno:EIO:N[:on], read-short:N[:on], read-signal:SIGINT:N      the same of reads
    read-kill-bytes:B   SIGKILL at the first read after B bytes of what is no output
    source:HOW:N        before read N, if it is of a source's weights or config, the file is: cut, rewritten, replaced, touched, removed

`Warm` is a process that has paid for imports and kernels once and forks: a run costs 0.05 s instead of a second.
The idea is SQLite's (https://sqlite.org/testing.html, "Crash Testing" and "I/O Error Testing").
"""

import argparse
import builtins
import errno
import functools
import gc
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CHANGES = (
    "pwrite pwritev write writev sendfile copy_file_range truncate ftruncate posix_fallocate fsync fdatasync replace "
    "rename unlink remove rmdir mkdir link symlink utime chmod fchmod"
)
READS = "preadv pread read readv stat lstat statvfs listdir scandir"
WRITES = ("pwrite", "write", "file write")
TO_SECOND = ("replace", "rename", "link", "symlink")  # the path that counts is where it goes
OPENED_TO_CHANGE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """What happens at which call. `on`: at all later ones too."""

    what: str = "none"
    detail: str = ""
    number: int = 0
    reads: bool = False
    on: bool = False

    @classmethod
    def parse(cls, text: str) -> "Fault":
        what, *rest = text.split(":")
        on = rest[-1:] == ["on"]
        rest = rest[: len(rest) - on]
        reads = what.startswith("read-") or what == "source"
        return cls(what.removeprefix("read-"), rest[0] if len(rest) == 2 else "", int(rest[-1]), reads, on)

    def meets(self, reads: bool, number: int) -> bool:
        return self.reads == reads and (number == self.number or (self.on and number > self.number))


class Watch:
    """The wrapped calls of this process: counts them, and lets the fault happen."""

    def __init__(self, fault: Fault, under: Path, report: Path | None = None):
        self.fault, self.under = fault, str(under.resolve()) + os.sep
        self._report = -1 if report is None else os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self.changes, self.reads, self.read_bytes = 0, 0, 0
        self.phases: list[str] = []  # of every change
        self.calls: list[str] = []  # their names
        self._paths: dict[int, str] = {}  # open files
        self._published, self._lock = False, threading.Lock()
        self._write, self._kill, self._stat = os.write, os.kill, os.stat

    def install(self) -> None:
        """Wrap os, open and what else ders calls. There is no way back: for a process of its own."""
        import fcntl

        from ders_cli.checkpoint import disk

        for reads, names in ((False, CHANGES), (True, READS)):
            for name in names.split():
                if hasattr(os, name):
                    self._wrap(os, name, reads)
        self._wrap(fcntl, "flock", False)
        self._wrap(disk, "_fallocate", False)
        plain_open, plain_close = os.open, os.close

        def opened(path: Any, flags: int, *given: Any, **named: Any) -> int:
            where = self._path("open", (path,), named)
            self.meet(not flags & OPENED_TO_CHANGE, "open", where)
            handle = plain_open(path, flags, *given, **named)
            self._paths[handle] = where
            return handle

        def closed(handle: int) -> None:
            self._paths.pop(handle, None)
            plain_close(handle)

        os.open, os.close = opened, closed
        builtins.open = io.open = self._file_opener(io.open)

    def _wrap(self, module: Any, name: str, reads: bool) -> None:
        plain = getattr(module, name)

        @functools.wraps(plain)
        def wrapped(*given: Any, **named: Any) -> Any:
            path = self._path(name, given, named)
            try:
                half = self.meet(reads, name, path, given)
            except OSError:
                if name == "_fallocate":  # it tells a failure by its result
                    return False
                raise
            if half and name in ("pwrite", "write"):
                given = (given[0], _half(given[1]), *given[2:])
            elif half and name == "preadv":
                given = (given[0], [_half(given[1][0])], *given[2:])
            result = plain(*given, **named)
            if half and self.fault.what == "torn":
                self._die()
            if reads and name in ("preadv", "pread", "read"):
                self._count_bytes(path, result if isinstance(result, int) else len(result))
            return result

        setattr(module, name, wrapped)

    def _file_opener(self, plain: Any) -> Any:
        watch = self

        class Raw(io.FileIO):
            """A file whose writes and reads are numbered when they reach the kernel, not Python's buffer."""

            def write(self, data: Any) -> int:
                half = watch.meet(False, "file write", self.where, (0, data))
                done = super().write(_half(data) if half else data)
                if half and watch.fault.what == "torn":
                    watch._die()
                return done

            def readinto(self, into: Any) -> int:
                watch.meet(True, "file read", self.where)
                got = super().readinto(into)
                watch._count_bytes(self.where, got or 0)
                return got

            def readall(self) -> bytes:
                watch.meet(True, "file read", self.where)
                got = super().readall()
                watch._count_bytes(self.where, len(got))
                return got

            def close(self) -> None:
                if not self.closed:
                    watch._paths.pop(self.fileno(), None)
                super().close()

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            where = self._path("open", (file,), {})
            if isinstance(file, int) or not self._counts(where):
                return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
            self.meet(not set(mode) & set("wax+"), "open", where)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
            raw.where = where
            self._paths[raw.fileno()] = where
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            return kind(raw) if "b" in mode else io.TextIOWrapper(kind(raw), encoding, errors, newline)

        return opened

    # --- at a call ---

    def meet(self, reads: bool, name: str, path: str, given: tuple = ()) -> bool:
        """Count one call; the fault if it is its turn. True: only half of it is to be done."""
        if not self._counts(path):
            return False
        with self._lock:
            if reads:
                self.reads += 1
            else:
                self.changes += 1
                self.phases.append(self._phase(name, path, given))
                self.calls.append(name)
            number = self.reads if reads else self.changes
        fault = self.fault
        if fault.what == "kill-bytes":
            if reads and self.read_bytes >= fault.number:
                self._die()
            return False
        if not fault.meets(reads, number):
            return False
        if fault.what == "torn" and name in WRITES:
            return True
        if fault.what in ("kill", "torn"):
            self._die()
        if fault.what == "short":
            return name in ("preadv", "pwrite") and len(_bytes(name, given)) > 1
        if fault.what == "signal":
            self._kill(os.getpid(), signal.Signals[fault.detail])
        elif fault.what == "source" and self._is_source(path):
            _change(Path(path), fault.detail)
        elif fault.what == "errno":
            code = getattr(errno, fault.detail)
            of_handle = name == "file write" or (given and isinstance(given[0], int))
            paths = (given[0], None, given[1]) if name in TO_SECOND else (path,)
            raise OSError(code, os.strerror(code), *(() if of_handle else paths))
        return False

    def _die(self) -> None:
        self.report()
        self._kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # this thread goes no further

    def report(self) -> None:
        """Numbers and phases, for who started this."""
        if self._report >= 0:
            names = ("changes", "reads", "read_bytes", "phases", "calls")
            text = {name: getattr(self, name) for name in names}
            self._write(self._report, json.dumps(text).encode())

    def _counts(self, path: str) -> bool:
        return path.startswith(self.under)

    def _count_bytes(self, path: str, count: int) -> None:
        if self._counts(path) and ".partial" not in path:
            with self._lock:
                self.read_bytes += count

    def _is_source(self, path: str) -> bool:
        """Weights or a configuration, of no output."""
        return path.endswith((".safetensors", "config.json")) and ".partial/" not in path and not self._published

    def _is_folder(self, path: Any) -> bool:
        try:
            return stat.S_ISDIR(self._stat(path).st_mode)
        except OSError:
            return False

    def _path(self, name: str, given: tuple, named: dict) -> str:
        """The absolute path that a call is about; "" where none is known, as of a pipe."""
        first = given[1] if name in TO_SECOND else given[0] if given else "."
        if isinstance(first, int):
            return self._paths.get(first, "")
        path = os.fsdecode(first)
        folder = named.get("dir_fd", named.get("dst_dir_fd"))
        return os.path.join(os.getcwd() if folder is None else self._paths.get(folder, "/"), path)

    def _phase(self, name: str, path: str, given: tuple) -> str:
        """The part of a run that a change belongs to, by name and path."""
        file = os.path.basename(path)
        if name == "mkdir":
            self._published = False
            return "mark"
        if self._published:
            return "after the last rename"
        if name in ("replace", "rename") and str(given[0]).endswith(".partial") and self._is_folder(given[0]):
            self._published = True
            return "last rename"
        for part, said in ((".journal", "journal"), (".ders-lock", "lock"), (".ders-plan", "mark")):
            if part in file:
                return "cleaning" if name in ("unlink", "remove") else said
        if name in ("unlink", "remove", "rmdir"):
            return "cleaning"
        if file.startswith(".ders-"):
            return "record"
        for known in ("config.json", "ders.json", "model.safetensors.index.json"):
            if file.startswith(known):
                return "index" if "index" in known else known
        if ".safetensors" in file:
            if name == "pwrite" and given[2] == 0:
                return "shard's header"
            return {"fsync": "shard's fsync", "replace": "shard's rename"}.get(name, "shard's data")
        return "publish" if name in ("fsync", "rename", "replace") and self._is_folder(path) else "carried file"


def _bytes(name: str, given: tuple) -> Any:
    return given[1][0] if name == "preadv" else given[1]


def _half(data: Any) -> memoryview:
    view = memoryview(data).cast("B")
    return view[: max(1, len(view) // 2)]


def _change(path: Path, how: str) -> None:
    """What somebody else does to a file that is being read."""
    if how == "removed":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "touched":
        os.utime(path)
    elif how == "rewritten":
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    elif how == "replaced":
        other = path.with_name(path.name + ".other")
        other.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
        other.rename(path)
    else:
        raise ValueError(how)


def run(arguments: list[str], watch: Watch | None) -> int:
    """`ders ARGUMENTS` in this process with its calls watched; the exit code."""
    from ders_cli import app

    if watch is not None:
        watch.install()
    sys.argv = ["ders", *arguments]
    try:
        app.main()
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):  # `ders` has ended; what follows is ours
            signal.signal(number, signal.SIG_IGN)
        if watch is not None:
            watch.report()


# --- one warm process, and runs that are forks of it ---


class Warm:
    """Starts runs of `ders` as forks of a process in which everything is imported and compiled."""

    def __init__(self, **environment: str):
        self._said = Path(tempfile.mkdtemp(prefix="ders-warm-"))
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | environment,
        )

    def _ask(self, **request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the warm process has ended: {self._process.wait()}"
        return json.loads(answer)

    def warm(self, *arguments: object) -> None:
        """Run a command in the warm process itself: what it compiles stays."""
        code = self._ask(warm=list(map(str, arguments)))
        assert code == 0, (arguments, code)

    def start(self, folder: Path, *arguments: object, fault: str = "none:0", **setting: Any) -> int:
        """Begin a run that counts calls below `folder`; its process id.

        setting: gate="FIFO that it waits for", limits={"NOFILE": 20}, user=65534.
        """
        given = {"arguments": list(map(str, arguments)), "fault": fault, "under": str(folder)}
        return self._ask(**given, said=str(self._said), **setting)

    def wait(self, pid: int) -> "Ended":
        """The end of a run: its exit code, negative for a signal; what it said; its report."""
        code = self._ask(wait=pid)
        said = [self._said / f"{pid}.{name}" for name in ("out", "err")]
        report = self._said / f"{pid}.json"
        ended = Ended(
            code,
            *(path.read_text(errors="replace") if path.exists() else "" for path in said),
            _read_report(report),
        )
        for path in (*said, report):
            path.unlink(missing_ok=True)
        return ended

    def run(self, folder: Path, *arguments: object, fault: str = "none:0", **setting: Any) -> "Ended":
        return self.wait(self.start(folder, *arguments, fault=fault, **setting))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        shutil.rmtree(self._said)

    def __enter__(self) -> "Warm":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_report(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # it was killed before, or in the middle of it
        return {}


@dataclass(frozen=True)
class Ended:
    """A run that has ended: exit code (negative: the signal), stdout, stderr, and the watch's report."""

    code: int
    out: str
    err: str
    report: dict[str, Any]

    @property
    def line(self) -> str:
        """The one line that an error is. AssertionError where there is more, or a traceback."""
        lines = [line for line in self.err.splitlines() if not line.startswith(("ders: note", "ders: warning"))]
        assert len(lines) == 1 and lines[0].startswith("ders: "), self.err
        return lines[0]


def serve() -> None:
    """Answer requests on stdin, one JSON object a line."""
    # Python's own copies: a fork must not write into the pipe
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    for line in requests:
        request = json.loads(line)
        if "warm" in request:
            with open(os.devnull, "w") as nowhere:
                sys.stdout, kept = nowhere, sys.stdout
                found: Any = run(request["warm"], None)
                sys.stdout = kept
            gc.collect()
            gc.freeze()
        elif "wait" in request:
            found = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            found = os.fork()
            if not found:
                _child(request)
        print(json.dumps(found), file=answers, flush=True)


def _child(request: dict[str, Any]) -> None:
    """A forked run; never returns."""
    import resource

    code = 99
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # until main() has its own handlers, as a shell would start it
            signal.signal(number, signal.SIG_IGN)
        signal.alarm(120)  # hanging is an end too: -SIGALRM
        said = Path(request["said"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(said / f"{os.getpid()}.{name}", os.O_WRONLY | os.O_CREAT, 0o666), number)
        watch = Watch(Fault.parse(request["fault"]), Path(request["under"]), said / f"{os.getpid()}.json")
        for name, most in request.get("limits", {}).items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        if "user" in request:
            os.setgroups([])
            os.setgid(request["user"])
            os.setuid(request["user"])
        if "gate" in request:
            os.open(request["gate"], os.O_RDONLY)  # a FIFO: until somebody opens its other end
        code = run(request["arguments"], watch)
    except BaseException:  # what escapes `ders` is a traceback for its user
        import traceback

        traceback.print_exc()
        code = 98
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", default="none:0")
    parser.add_argument("--count", action="store_true", help="say how many calls there were, and in which parts")
    parser.add_argument("--under", type=Path, default=Path())
    parser.add_argument("--serve", action="store_true", help="for Warm")
    parser.add_argument("arguments", nargs="*")
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    watch = Watch(Fault.parse(given.fault), given.under)
    code = run(given.arguments, watch)
    if given.count:
        print(f"{watch.changes} changes, {watch.reads} reads, {watch.read_bytes} bytes read", file=sys.stderr)
        for phase, count in Counter(watch.phases).items():
            print(f"{count:5} {phase}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
