"""Peak anonymous memory and time of conversions of synthetic MoEs of different size.

    python docs/measure/memory.py SCRATCH --gigabytes 1 --gigabytes 8 --delta int4

Makes Mixtral-shaped checkpoints (ders_cli/bench_model.py: 8 experts, hidden 2048, inner 5632: 554 MB a layer) in
SCRATCH, runs `ders compress`, `ders restore` and `ders verify` on them and samples RssAnon of /proc/PID/status every
10 ms. Idle is the same process at its first sample after its imports: measured by `ders compress --dry-run`.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ders_cli.bench_model import Shape, make_model


def run(*arguments: str) -> tuple[float, float, float]:
    """Peak RssAnon in MB, wall and CPU seconds of one `ders` command."""
    began, before = time.time(), _cpu_of_children()
    process = subprocess.Popen([sys.executable, "-m", "ders_cli", *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()  # a zombie until it is polled: the file is there
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)  # a process that has ended has no memory to tell of
        peak = max(peak, int(anonymous[1]) if anonymous else 0)
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"ders {' '.join(arguments)}: exit {process.returncode}")
    return peak * 1024 / 1e6, time.time() - began, _cpu_of_children() - before


def _cpu_of_children() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--gigabytes", type=float, action="append", default=[])
    parser.add_argument("--delta", action="append", default=[])
    args = parser.parse_args()
    for gigabytes in args.gigabytes:
        model, packed, plain = (args.scratch / f"{kind}-{gigabytes:g}" for kind in ("model", "packed", "plain"))
        layers = make_model(model, gigabytes)
        idle, *_ = run("compress", str(model), "-o", str(packed), "--dry-run")
        size = layers * Shape().layer_bytes / 1e9
        for delta in args.delta:
            for name, command in {
                "compress": ("compress", str(model), "--delta", delta, "-o", str(packed), "-q", "--overwrite"),
                "verify": ("verify", str(packed), "--against", str(model), "-q"),
                "restore": ("restore", str(packed), "-o", str(plain), "-q", "--overwrite"),
            }.items():
                peak, wall, cpu = run(*command)
                print(
                    f"{size:5.2f} GB {delta:12s} {name:9s} peak {peak:6.0f} MB, {peak - idle:+6.0f} above idle {idle:.0f}; "
                    f"{wall:6.1f} s wall, {cpu:6.1f} s CPU, {cpu / size:.2f} CPU-s/GB",
                    flush=True,
                )
        for folder in (model, packed, plain):
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
