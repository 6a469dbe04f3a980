"""What the Ray engine costs beside the local one: its start and end, each shard, and its processes' memory.

    python docs/measure/ray_overhead.py [--rounds 3]        # minutes on two cores; needs ders-cli[ray] and [dev]

A tiny model (48 layers) is compressed to int4 into one file and into 241, by threads of this process and by a Ray
that is started for it; medians of rounds that take turns. Both engines have the same cores. What a file more costs is
the difference by 240, what starting and ending Ray costs is that of the runs with one file.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for Ray's workers


def descendants(parent: int) -> list[int]:
    """Processes below `parent`."""
    parents = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit():
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # gone meanwhile
            continue
    found, edge = [], {parent}
    while edge:
        edge = {pid for pid, above in parents.items() if above in edge}
        found += edge
    return found


def shares(pids: list[int]) -> int:
    """Bytes of memory that the processes have, what they share divided among its users (PSS)."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def watched(act: Callable[[], None]) -> tuple[int, int]:
    """Most processes below this one while act() runs, and most bytes of them."""
    most, ended = [0, 0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            below = descendants(os.getpid())
            most[:] = max(most[0], len(below)), max(most[1], shares(below))

    thread = threading.Thread(target=watch)
    thread.start()
    act()
    ended.set()
    thread.join()
    return most[0], most[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds

    import torch
    import toy
    from command import done

    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        sizes = dict(num_hidden_layers=48, hidden_size=128, intermediate_size=96, num_local_experts=4)
        toy.make("mixtral", model, dtype=torch.bfloat16, **sizes)

        def compress(engine: str, size: str) -> int:
            done("compress", model, "-o", out, "-q", "--overwrite", "--engine", engine, "--max-shard-size", size)
            return len(list(out.glob("*.safetensors")))

        compress("local", "5GB")  # compiles
        for _ in range(rounds):
            for engine in ("local", "ray"):
                for size in ("5GB", "60kB"):
                    began = time.monotonic()
                    files = compress(engine, size)
                    seconds.setdefault((engine, files), []).append(time.monotonic() - began)
        processes, memory = watched(lambda: compress("ray", "60kB"))

    median = {run: statistics.median(found) for run, found in seconds.items()}
    for (engine, files), found in seconds.items():
        print(f"{engine:6} {files:4} file(s)  {median[engine, files]:6.2f} s  of {[round(each, 2) for each in found]}")
    many = max(files for _, files in median)
    for engine in ("local", "ray"):
        print(f"{engine}: a file more {1000 * (median[engine, many] - median[engine, 1]) / (many - 1):.1f} ms")
    print(f"ray: start and end {median['ray', 1] - median['local', 1]:.2f} s")
    print(f"ray: {processes} processes, {memory / 1e6:.0f} MB (PSS) beside the command's own")
    print(f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
