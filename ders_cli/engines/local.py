"""The local engine: threads in one process. Kernels, pread and pwrite release the interpreter lock."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

from threadpoolctl import threadpool_limits

from ..errors import DersError, Interrupted
from ..report import Progress

Result = TypeVar("Result")


def run_shards(
    job: Callable[[int, Progress], Result], count: int, folder: Path, threads: int, progress: Progress
) -> list[Result]:
    """job(0, progress) ... job(count - 1, progress), one after another; each shares its own work among threads (`run`)."""
    return [job(number, progress) for number in range(count)]


def run(tasks: Sequence[Callable[[], Result]], jobs: int, ahead: Callable[[int], None] | None = None) -> list[Result]:
    """Run every task, `jobs` at a time; results in the tasks' order. The first error stops the rest and is raised.

    `ahead(i)` is called when task i is `jobs` tasks off: what it reads may be fetched meanwhile.

    BLAS stays at one thread: its sums would otherwise depend on how many it has.
    """
    if ahead is not None:
        tasks = [partial(_foretold, task, ahead, number + jobs, len(tasks)) for number, task in enumerate(tasks)]
    with _one_blas_thread():
        if jobs == 1:
            return [task() for task in tasks]
        pool, waits = ThreadPoolExecutor(jobs), True
        try:
            futures = [_submitted(pool, task) for task in tasks]
            wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.done() and future.exception() for future in futures):
                for future in reversed(futures):
                    future.cancel()  # what has begun ends: of several faults the first in order is raised, whoever met it
            for future in futures:
                if not future.cancelled() and future.exception():
                    raise future.exception()
            return [future.result() for future in futures]
        except Interrupted:
            waits = False
            raise
        finally:
            pool.shutdown(wait=waits, cancel_futures=True)


_under_way: list[threadpool_limits] = []  # one for each run of this process; each knows what it found
_changing = Lock()


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """The limit is the process's, not a thread's: of several runs at once, whichever ends takes away the latest one's, which
    found one thread, and the last to end the first one's."""
    with _changing:
        _under_way.append(threadpool_limits(1, "blas"))  # which notes what it found
    try:
        yield
    finally:
        with _changing:
            _under_way.pop().restore_original_limits()


def _submitted(pool: ThreadPoolExecutor, task: Callable[[], Result]) -> Future[Result]:
    try:
        return pool.submit(task)
    except RuntimeError as error:  # "can't start new thread"
        raise DersError(
            f"{error}: too little memory, or too many processes for `ulimit -u`; fewer --jobs need less"
        ) from None


def _foretold(task: Callable[[], Result], ahead: Callable[[int], None], number: int, count: int) -> Result:
    if number < count:
        ahead(number)
    return task()
