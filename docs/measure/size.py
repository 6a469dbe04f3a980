"""Memory and time against a model's size: is either more than proportional?

    python docs/measure/size.py SCRATCH                          0.5, 2, 8 and 32 GB
    python docs/measure/size.py SCRATCH --gigabytes 0.5 --gigabytes 2

For each size a synthetic model (ders_cli/bench_model.py) is made in SCRATCH; then, each a process of its own, `ders
compress --delta int4`, `ders verify`, `ders verify --against`, and, when the model has been removed to make room, `ders
restore`. Peak is RssAnon above that of `ders compress --dry-run` (memory.py). A size that would not leave its 1.5-fold free on
the disk is left out, and said. A model larger than memory is read from the disk: its wall times are the disk's.

The last table is a straight line through a command's CPU seconds, by least squares of the relative errors: seconds for no
bytes at all, seconds for each GB, and how far the sizes lie from it.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from memory import run

from ders_cli.bench_model import Shape, make_model

SIZES = (0.5, 2.0, 8.0, 32.0)
ROOM = (
    1.5  # bytes on the disk for one of the model: itself, or restored, beside its DeRS form of 0.39, and some to spare
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gigabytes", type=float, action="append", default=[])
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {}
    print("| GB | command | wall s | CPU-s/GB | peak MB above idle |\n|---|---|---|---|---|")
    for gigabytes in args.gigabytes or SIZES:
        free = shutil.disk_usage(args.scratch).free
        if ROOM * gigabytes * 1e9 > free:
            print(
                f"| {gigabytes:g} | left out: {ROOM * gigabytes:.1f} GB of disk needed, {free / 1e9:.1f} free | | | |"
            )
            continue
        for command, size, cpu in measured(args.scratch / f"size-{gigabytes:g}", gigabytes):
            found.setdefault(command, []).append((size, cpu))
    print("\n| command | s for 0 GB | CPU-s for each GB | furthest from the line |\n|---|---|---|---|")
    for command, points in found.items():
        if len(points) > 2:  # two always lie on a line
            start, each, off = line(*np.array(points).T)
            print(f"| {command} | {start:.2f} | {each:.3f} | {off:.1%} |")


def measured(folder: Path, gigabytes: float) -> list[tuple[str, float, float]]:
    """(command, GB, CPU seconds) of one size, printed as they come. What is written is removed."""
    model, packed, plain, rows = folder / "model", folder / "packed", folder / "plain", []
    try:
        size = make_model(model, gigabytes) * Shape().layer_bytes / 1e9
        idle, *_ = run("compress", str(model), "-o", str(packed), "--dry-run")
        for name, command in {
            "compress int4": ("compress", str(model), "--delta", "int4", "-o", str(packed), "-q"),
            "verify": ("verify", str(packed), "-q"),
            "verify --against": ("verify", str(packed), "--against", str(model), "-q"),
            "restore": ("restore", str(packed), "-o", str(plain), "-q"),
        }.items():
            if name == "restore":
                shutil.rmtree(model)
            peak, wall, cpu = run(*command)
            print(f"| {size:.2f} | {name} | {wall:.1f} | {cpu / size:.2f} | {peak - idle:.0f} |", flush=True)
            rows.append((name, size, cpu))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def line(sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float]:
    """a, b of seconds = a + b * size where the relative errors' squares are least, and the largest relative error."""
    (start, each), *_ = np.linalg.lstsq(np.stack([1 / seconds, sizes / seconds], 1), np.ones(len(sizes)), rcond=None)
    return start, each, float(np.abs((start + each * sizes) / seconds - 1).max())


if __name__ == "__main__":
    main()
