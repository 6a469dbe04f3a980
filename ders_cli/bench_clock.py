"""Times of two calls beside each other, and the memory bandwidth that they are held to.

A call takes the number of an input set. On a GPU sets are taken in turn, so that its L2 doesn't hold the weights, with
events around each call (eager) and around a graph of calls; on a CPU the two calls alternate. Medians, in ms.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

Call = Callable[[int], object]

GRAPH_CALLS = 16  # in one graph: the events' own microseconds are shared by so many


@dataclass(frozen=True)
class Times:
    """ms. `graph`: of a call inside a CUDA graph; None on a CPU, or if it can't be captured: `no_graph` says why."""

    eager: float
    graph: float | None = None
    no_graph: str = ""

    @property
    def best(self) -> float:
        return self.eager if self.graph is None else self.graph


def time_pair(
    ours: Call, dense: Call | None, sets: int, device: torch.device, seconds: float
) -> tuple[Times, Times | None]:
    """Each of the two in about `seconds`, three times at least; dense may have no counterpart."""
    if device.type == "cuda":
        return _on_cuda(ours, sets, seconds), _on_cuda(dense, sets, seconds) if dense else None
    calls = [call for call in (ours, dense) if call]
    for call in calls:
        _warm(call, sets)
    found: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while len(found[0]) < 3 or time.perf_counter() - begin < seconds * len(calls):
        number = len(found[0]) % sets
        for call, own in zip(calls, found):
            own.append(_seconds(call, number))
    times = [Times(median(own) * 1e3) for own in found]
    return times[0], times[1] if dense else None


def bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second, the better of copying `size` bytes (read and written) and of summing them (read), at their fastest."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copied, summed = _fastest(lambda i: target.copy_(source), device), _fastest(lambda i: source.sum(), device)
    return max(2 * source.nbytes / copied, source.nbytes / summed)


def _fastest(call: Call, device: torch.device) -> float:
    """Seconds; a limit is what is possible, so no median."""
    call(0)
    if device.type == "cuda":
        return min(_events([lambda: call(0)] * 20)) / 1e3
    return min(_seconds(call, 0) for _ in range(10))


def _warm(call: Call, sets: int) -> None:
    """Compiles, and lets a backend work out what it keeps for each expert."""
    for number in range(sets):
        call(number)


def _seconds(call: Call, number: int) -> float:
    begin = time.perf_counter()
    call(number)
    return time.perf_counter() - begin


def _on_cuda(call: Call, sets: int, seconds: float) -> Times:
    _warm(call, sets)
    torch.cuda.synchronize()
    once = max(1e-5, median(_events([lambda n=n: call(n % sets) for n in range(5)])) / 1e3)
    repeats = max(3, min(200, int(seconds / once)))
    eager = median(_events([lambda n=n: call(n % sets) for n in range(repeats)]))
    try:
        graph, calls = _captured(call, sets)
    except RuntimeError as error:  # it waits for the GPU, say
        torch.cuda.synchronize()
        return Times(eager, None, str(error).splitlines()[0])
    graph.replay()
    replays = max(3, min(50, int(seconds / once / calls)))
    return Times(eager, median(_events([graph.replay] * replays)) / calls)


def _captured(call: Call, sets: int) -> tuple[torch.cuda.CUDAGraph, int]:
    calls, graph, before = min(sets, GRAPH_CALLS), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        call(0)
    before.wait_stream(side)
    try:
        with torch.cuda.graph(graph):
            for number in range(calls):
                call(number)
    finally:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own
    return graph, calls


def _events(calls: list[Callable[[], object]]) -> list[float]:
    """ms of each, on the GPU's clock; nothing waits in between."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    for call, (begin, end) in zip(calls, marks):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]
