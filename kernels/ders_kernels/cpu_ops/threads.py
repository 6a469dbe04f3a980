"""One compiled task on all of torch's threads: it releases the interpreter lock, so Python's own threads will do."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def share(task: Callable[[int, int], object], count: int, worth: int | None = None) -> None:
    """task(first, last) for consecutive parts of 0..count-1, one for each of torch's threads, or for the `worth` that pay."""
    threads = min(torch.get_num_threads(), count, count if worth is None else max(1, worth))
    if threads <= 1:
        task(0, count)
        return
    bounds = [count * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(task, a, b) for a, b in zip(bounds[1:-1], bounds[2:], strict=True)]
    task(bounds[0], bounds[1])
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "ders")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has no threads but its own
