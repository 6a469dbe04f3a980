"""Peak anonymous memory and time of conversions of synthetic MoEs of different size.

    python docs/measure/memory.py SCRATCH --gigabytes 1 --gigabytes 8 --delta int4

Makes Mixtral-shaped checkpoints of random bf16 weights (8 experts, hidden 2048, inner 5632: 554 MB a layer) in
SCRATCH, runs `ders compress`, `ders restore` and `ders verify` on them and samples RssAnon of /proc/PID/status every
10 ms. Idle is the same process at its first sample after its imports: measured by `ders compress --dry-run`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ders_cli.checkpoint.tensor import TensorSpec
from ders_cli.checkpoint.writer import ShardWriter

HIDDEN, INNER, EXPERTS = 2048, 5632, 8
LAYER_BYTES = 3 * HIDDEN * INNER * EXPERTS * 2


def make(folder: Path, gigabytes: float) -> int:
    """A MoE of about so many bytes; returns its layers. Experts are one base plus small steps of the last bits."""
    layers = max(1, round(gigabytes * 1e9 / LAYER_BYTES))
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    specs = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.block_sparse_moe"
        specs[f"{prefix}.gate.weight"] = TensorSpec((EXPERTS, HIDDEN), "BF16")
        for expert in range(EXPERTS):
            for name, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN))):
                specs[f"{prefix}.experts.{expert}.{name}.weight"] = TensorSpec(shape, "BF16")
    writer = ShardWriter(folder / "model.safetensors", specs)
    normal = random.standard_normal(HIDDEN * INNER, np.float32) * np.float32(0.02)
    base = (normal + np.copysign(np.float32(1e-4), normal)).view(np.uint32) >> 16  # away from 0: its last bits can move
    for name, spec in specs.items():
        step = random.integers(-2, 3, spec.size, np.int8)
        writer.write(name, 0, (base[: spec.size].astype(np.int32) + step).astype(np.uint16))
    writer.close()
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_act": "silu",
        "num_local_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers


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
        layers = make(model, gigabytes)
        idle, *_ = run("compress", str(model), "-o", str(packed), "--dry-run")
        size = layers * LAYER_BYTES / 1e9
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
