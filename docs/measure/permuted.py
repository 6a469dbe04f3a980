"""What it costs that experts' neurons stand in another order, and what `--align` gives back.

    python docs/measure/permuted.py MODEL WORK [--delta exact --delta int4] [--jobs 2]

Makes WORK/permuted, a copy of MODEL (one whose layout ders knows) in which the neurons of all experts but the first of each
layer stand in a random order: the same function, other files. Converts MODEL, the copy, and the copy with --align; prints bits
per delta weight, mean weight error, CPU-seconds, the search's CPU-seconds per GB of experts, and whether an aligned exact
conversion restores to the copy's own SHA-256. WORK holds three times the model; nothing of it is removed.
"""

import argparse
import hashlib
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ders_cli.alignment import find_orders
from ders_cli.checkpoint.tensor import STORAGE
from ders_cli.report import Progress
from ders_cli.source import open_source


def permute(model: Path, out: Path, seed: int) -> None:
    """A copy whose experts' neurons stand in random orders, changed in the files' own layout."""
    shutil.copytree(model, out)
    random, orders = np.random.Generator(np.random.Philox(key=seed)), {}
    with open_source(model) as source:
        for group in source.groups:
            layer, down = group.name.rpartition(".")[0], group.projection == "down"
            for label, view in group.members[1:]:
                inner = group.shape[1 if down else 0]
                order = orders.setdefault((layer, label), random.permutation(inner))
                place, dtype = source.reader.places[view.tensor], STORAGE[group.dtype]
                shape = (source.reader.tensors[view.tensor].size,)
                flat = np.memmap(out / place.file, dtype, "r+", place.begin, shape)
                strides = (view.row_stride * dtype.itemsize, view.column_stride * dtype.itemsize)
                matrix = np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, strides)
                matrix[:] = matrix[:, order] if down else matrix[order]


def search(model: Path, jobs: int) -> str:
    """What looking for the orders takes."""
    with open_source(model) as source:
        size = sum(math.prod(g.shape) * STORAGE[g.dtype].itemsize * len(g.members) for g in source.groups) / 1e9
        began, busy = time.perf_counter(), time.process_time()
        found = find_orders(source, jobs, Progress())
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
    moved = sum(len(own) for own in found.values())
    return f"{moved} experts out of order; {size:.2f} GB in {seconds:.1f} s, {busy / size:.2f} CPU-s/GB"


def ders(*arguments: object) -> float:
    """Run a command; its CPU-seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "ders_cli", *map(str, arguments), "-q"], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--delta", action="append")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    copy, out = given.work / "permuted", given.work / "out"
    permute(given.model, copy, seed=0)
    for model in (given.model, copy):
        print(f"search in {model.name}: {search(model, given.jobs)}")
    print("\n| `--delta` | model | bits | weight error | CPU-seconds |\n|---|---|---|---|---|")
    for delta in given.delta or ["exact", "int4"]:
        for name, model, more in (
            ("in order", given.model, ()),
            ("permuted", copy, ()),
            ("permuted, --align", copy, ("--align",)),
        ):
            seconds = ders("compress", model, "--delta", delta, "-o", out, "--overwrite", "-j", given.jobs, *more)
            document = json.loads((out / "ders.json").read_text())
            errors = [member["error"]["weight"] for group in document["groups"] for member in group["members"]]
            bits, error = document["bytes"]["bits_per_delta_weight"], sum(errors) / len(errors)
            print(f"| {delta} | {name} | {bits:.3f} | {error:.2e} | {seconds:.1f} |", flush=True)
        if delta == "exact":
            seconds = ders("restore", out, "-o", given.work / "restored", "-j", given.jobs)
            same = sums(given.work / "restored") == sums(copy)
            print(
                f"| | restored in {seconds:.1f} CPU-s: SHA-256 of all files {'equal' if same else 'DIFFERENT'} | | | |"
            )


if __name__ == "__main__":
    main()
