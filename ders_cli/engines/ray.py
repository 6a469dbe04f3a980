"""The Ray engine: output shards are tasks of a Ray cluster, whose nodes see the same storage.

    driver: the job, pickled, once -> one task a shard -> results in order
    worker: the driver's version of ders? its OUT.partial? -> job(number) reads and writes the storage by itself

Weights never pass through Ray: a task gets a number and returns the shard's record. Where a worker or a node dies,
Ray starts its tasks again; each attempt at a shard writes a file of its own and the last step is a rename (writer.py),
so it doesn't matter whether the one given up is really dead. The bytes are the local engine's: it is the same job.
"""

import logging
import os
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from .. import __version__
from ..errors import DersError, Interrupted, UsageError
from ..report import Progress

RETRIES = 3  # times that a shard is tried again after its worker or its node has died
TICK = 0.3  # seconds between two looks at the tasks, and between two words of a worker on its progress
PATIENCE = 30  # seconds: an NFS client may believe for that long that a new folder isn't there (its acdirmin)
STORE_BYTES = 200_000_000  # Ray's object store: the job and the records pass through it, no weights
SHARED = "every node needs the model and the output at the same paths, on storage that all of them share"

Job = Callable[[int, Progress], Any]


def require_ray() -> ModuleType:
    """Ray, imported. Raises UsageError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine ray: {error}; pip install 'ders-cli[ray]'") from None
    return ray


def checked_address(given: str | None) -> str | None:
    """--address, or what RAY_ADDRESS says (in a job that was submitted to a cluster); None: a Ray of our own."""
    address = given or os.environ.get("RAY_ADDRESS") or None
    if address is not None and "://" in address:
        raise UsageError(
            f"--address {address}: ders does not run through the Ray client; run it on a node of the cluster "
            "(`ray job submit -- ders ...`) with --address auto"
        )
    return address


def run_shards(
    address: str | None, cores: int, asked: bool, job: Job, count: int, folder: Path, threads: int, progress: Progress
) -> list[Any]:
    """job(0) ... job(count - 1) on the cluster's nodes, each with `threads` CPUs of one node; results in order.

    The first DersError or OSError of a job stops the rest and is raised as it was there. DersError also where a shard's
    workers died RETRIES + 1 times, UsageError where the cluster can't be joined or has no room for a job.
    """
    ray, run = require_ray(), uuid4().hex
    sign = folder / f".ders-{run}.sign"  # what a worker must see, or its OUT.partial is another
    sign.touch()
    try:
        with _cluster(ray, address, max(cores, threads)) as look:
            cpus = _cpus(ray, threads, asked)
            counter = _counter(ray) if progress.drawn else None
            task = ray.remote(num_cpus=cpus, max_retries=RETRIES, scheduling_strategy="SPREAD")(_first_step())
            told = __version__, run, [ray.put(ray.cloudpickle.dumps(job))], str(sign), os.getcwd(), counter
            tasks = {task.remote(*told, number): number for number in range(count)}
            return _finished(ray, tasks, counter, progress, look)
    finally:
        sign.unlink(missing_ok=True)


@contextmanager
def _cluster(ray: ModuleType, address: str | None, cpus: int) -> Iterator[Callable[[], None]]:
    """Connected to Ray, without its words on our stdout and stderr. A connection that the program has made stays.

    Gives what has to be called now and then, outside of Ray: it raises Interrupted if a signal came meanwhile.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
    ours = not ray.is_initialized()
    with _held_signals() as (hold, look):
        try:
            with _deaf():
                if ours and address is None:
                    ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)
                elif ours:
                    ray.init(address, **quiet)
                hold()  # Ray has put handlers of its own, of which one exits with 1 and one aborts
            look()
            yield look
        except SystemExit:  # by one of them, if another thread of ours got the signal
            raise Interrupted from None
        except (ConnectionError, RuntimeError, ValueError) as error:
            if ray.is_initialized():
                raise
            raise UsageError(f"--engine ray: {' '.join(str(error).split())[:400]}") from None
        finally:
            if ours:
                ray.shutdown()


@contextmanager
def _deaf() -> Iterator[None]:
    """SIGTERM waits until the end of this, and never comes to the processes that are started in here: one that goes to the
    whole process group is for us to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _held_signals() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """SIGINT and SIGTERM wait for `look`: what a handler raises in the middle of Ray's own code is lost there.

    Gives (hold, look). At the end they are delivered as if they came then, so nothing breaks off a shutdown either.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def hold() -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.signal(number, lambda number, frame: came.append(number))
                before.setdefault(number, handler)

    def look() -> None:
        if came:
            raise Interrupted

    hold()
    try:
        yield hold, look
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _cpus(ray: ModuleType, threads: int, asked: bool) -> int:
    """CPUs that a task asks for. One that no node can offer would wait for ever."""
    offered = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if not any(offered):
        raise UsageError("--engine ray: no node of the cluster offers a CPU; start a worker node first")
    if asked and threads > max(offered):
        raise UsageError(f"--jobs {threads}: are CPUs of one node; the cluster's largest node offers {max(offered)}")
    return threads if asked else min(threads, *(cpus for cpus in offered if cpus))


def _counter(ray: ModuleType) -> Any:
    """The actor that workers tell of their progress: on this node, so that it doesn't die with a worker's."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Counter).remote()


class Counter:
    """Bytes done, of every shard; one that starts again starts at 0."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def tell(self, number: int, done: int) -> None:
        self._done[number] = done

    def total(self) -> int:
        return sum(self._done.values())


class _Told(Progress):
    """Progress of one shard, told to the counter now and then."""

    def __init__(self, counter: Any, number: int):
        self._counter, self._number, self._lock, self._done, self._last = counter, number, threading.Lock(), 0, 0.0

    def advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if time.monotonic() - self._last > TICK:
                self.tell()

    def tell(self) -> None:
        self._counter.tell.remote(self._number, self._done)
        self._last = time.monotonic()


def _finished(
    ray: ModuleType, tasks: dict[Any, int], counter: Any, progress: Progress, look: Callable[[], None]
) -> list[Any]:
    """Results of all tasks {reference: number}, in the order of their numbers. On an error the others are ended."""
    waiting, results, shown = list(tasks), {}, 0
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=TICK)
            look()
            for reference in ready:
                number = tasks[reference]
                results[number] = _result(ray, reference, f"output shard {number + 1} of {len(tasks)}")
            if counter is not None:
                total = _total(ray, counter, shown)
                progress.advance(total - shown)
                shown = total
    except BaseException:
        for reference in waiting:
            ray.cancel(reference, force=True)
        raise
    return [results[number] for number in range(len(tasks))]


def _result(ray: ModuleType, reference: Any, name: str) -> Any:
    try:
        failed, result = ray.get(reference)
    except ray.exceptions.RayTaskError:  # a fault of ders, with its traceback
        raise
    except ray.exceptions.RayError as error:
        why = " ".join(str(error).split())[:300]
        raise DersError(
            f"{name}: its workers died {RETRIES + 1} times (of too little memory? fewer --jobs need less; "
            f"--resume continues). Ray says: {why}"
        ) from None
    if failed:
        raise UsageError(result) if isinstance(result, str) else result
    return result


def _total(ray: ModuleType, counter: Any, last: int) -> int:
    """Bytes done; the last number where the counter doesn't answer: a bar is nothing to fail for."""
    try:
        return ray.get(counter.total.remote(), timeout=TICK)
    except ray.exceptions.RayError:
        return last


def _first_step() -> Callable[..., tuple[bool, Any]]:
    """A worker's first step. Defined in here it is pickled by value: it runs where ders is missing, or is another."""

    def ders_shard(version: str, *told: Any) -> tuple[bool, Any]:

        node = f"node {platform.node()}"
        try:
            import ders_cli

            if ders_cli.__version__ != version:
                raise ImportError(f"has ders-cli {ders_cli.__version__}")
            from ders_cli.engines.ray import work
        except ImportError as error:
            return True, f"{node}: {error}; every node needs ders-cli {version}, as the driver has"
        return work(node, *told)

    return ders_shard


_jobs: dict[str, Job] = {}  # in a worker: the job of the run that it works for, unpickled once


def work(node: str, run: str, job: list[Any], sign: str, cwd: str, counter: Any, number: int) -> tuple[bool, Any]:
    """In a worker: (False, the job's result), or (True, the error to raise at the driver)."""
    try:
        _look(node, Path(sign), PATIENCE)
        if run not in _jobs:
            _jobs.clear()
            _jobs[run] = _opened(node, job, cwd)
        progress = _Told(counter, number) if counter is not None else Progress()
        result = _jobs[run](number, progress)
        if isinstance(progress, _Told):
            progress.tell()
        return False, result
    except (DersError, OSError, MemoryError) as error:
        error.add_note(f"on {node}:\n{traceback.format_exc()}")  # for --debug
        return True, error


def _look(node: str, sign: Path, patience: float) -> None:
    """Raise UsageError unless the driver's sign is seen here: a folder of the same name may be another disk's."""
    until = time.monotonic() + patience
    while not sign.exists():
        if time.monotonic() > until:
            raise UsageError(f"{node}: {sign.parent}: is not the driver's folder here; {SHARED}")
        time.sleep(TICK)


def _opened(node: str, job: list[Any], cwd: str) -> Job:
    """The job, its source opened by the paths that the driver used, which may be relative."""
    import ray

    if os.path.isdir(cwd):
        os.chdir(cwd)
    try:
        return ray.cloudpickle.loads(ray.get(job[0]))
    except OSError as error:
        path = Path(cwd) / (error.filename or "")
        raise UsageError(f"{node}: {path}: {error.strerror}; {SHARED}") from None
