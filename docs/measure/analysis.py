"""What `ders analyze` costs beside reading alone: CPU seconds and wall time a GB, and peak memory above idle.

    python docs/measure/analysis.py SCRATCH                                1 and 8 GB
    python docs/measure/analysis.py SCRATCH --gigabytes 1 --experts 64 --inner 704

For each size a synthetic model (ders_cli/bench_model.py) is made in SCRATCH. Then, --rounds times in turn, each a process of its
own that has its kernels compiled or loaded before the clock starts:

    reading      the experts' rows, as blocks read them, and nothing else
    mean         and the base
    gram         and the inner products of all experts
    statistics   and all that knows nothing of codecs: gram, moments, steps, noise
    whole        `ders analyze` as it is: also order of neurons, spectra, predictions of its codecs, document

Peak is RssAnon, sampled every 10 ms, above that of the process before it reads. The least of the rounds counts for time.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

PARTS = ("reading", "mean", "gram", "statistics", "whole")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gigabytes", type=float, action="append", default=[])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, help="measure this one on the model SCRATCH, in this process")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measured(args.part, args.scratch, args.jobs)))
        return
    from ders_cli.bench_model import Shape, make_model

    print("| GB | part | CPU-s/GB | GB/s | peak MB above idle |\n|---|---|---|---|---|")
    for gigabytes in args.gigabytes or (1.0, 8.0):
        folder, shape = args.scratch / f"analysis-{gigabytes:g}", Shape(args.experts, inner=args.inner)
        try:
            size = make_model(folder, gigabytes, shape) * shape.layer_bytes / 1e9
            runs = [(part, run(part, folder, args.jobs)) for _ in range(args.rounds) for part in PARTS]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for part in PARTS:
            cpu, wall, peak = zip(*(found for name, found in runs if name == part), strict=True)
            print(
                f"| {size:.2f} | {part} | {min(cpu) / size:.2f} | {size / min(wall):.2f} | {max(peak):.0f} |",
                flush=True,
            )


def run(part: str, model: Path, jobs: int) -> tuple[float, float, float]:
    """CPU and wall seconds of one part in a process of its own, and its peak in MB above idle."""
    command = [sys.executable, __file__, str(model), "--part", part, "--jobs", str(jobs)]
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{part}: exit {process.returncode}")
    found = json.loads(process.stdout.read())
    return found["cpu"], found["wall"], (peak - found["idle"]) / 1e6


def anonymous(process: int) -> int:
    """RssAnon in bytes; 0 of a process that has ended."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def measured(part: str, model: Path, jobs: int) -> dict[str, float]:
    """One part on a model, after a small model of the same dtype."""
    import os
    import tempfile

    from ders_cli.bench_model import Shape, make_model

    idle = anonymous(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "small", 0, Shape(2, 128, 256))
        perform(part, Path(folder) / "small", jobs)
    cpu, wall = time.process_time(), time.perf_counter()
    perform(part, model, jobs)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "idle": idle}


def perform(part: str, model: Path, jobs: int) -> None:
    from ders_cli.analysis.analyze import Asked, analyze
    from ders_cli.analysis.blocks import block_rows, layers_of, observe_layer
    from ders_cli.analysis.gram import Gram
    from ders_cli.analysis.moments import Moments
    from ders_cli.analysis.noise import Noise
    from ders_cli.analysis.steps import Steps
    from ders_cli.base import MeanBase
    from ders_cli.engines import local
    from ders_cli.source import open_source, row_blocks

    observers = {"mean": [], "gram": [Gram], "statistics": [Gram, Moments, Steps, Noise]}

    def read(groups) -> None:
        for group in groups.values():
            for rows in row_blocks(group.shape, block_rows(group)):
                for expert in range(len(group.members)):
                    source.read(group, expert, rows)

    def observe(groups) -> None:
        observe_layer(source, MeanBase(), groups, [kind() for kind in observers[part]], lambda count: None)

    with open_source(model) as source:
        if part == "whole":
            analyze(source, Asked(jobs=jobs))
        else:
            work = read if part == "reading" else observe
            local.run([partial(work, groups) for groups in layers_of(source).values()], jobs)


if __name__ == "__main__":
    main()
