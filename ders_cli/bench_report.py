"""The rows of `ders bench`: for a person a table for each operation, for a program one document."""

from dataclasses import asdict
from typing import Any

import torch

from .bench import Bench, Row
from .bench_machine import processor, versions
from .report import print_table

SCHEMA = 1
HEADER = ["delta", "shape", "tokens", "backend", "ms", "graph ms", "GB/s", "GFLOP/s", "dense ms", "x dense", "of limit"]


def print_rows(rows: list[Row]) -> None:
    """One operation's rows; a refusal stands where its numbers would."""
    print_table(rows[0].op, HEADER, [_line(row) for row in rows])
    for why in dict.fromkeys(row.refused for row in rows if row.refused):
        print(f"  - {why}")


def _line(row: Row) -> list[str]:
    shape = "x".join(map(str, row.shape)) + (f", top-{row.top_k} of {row.experts}" if row.op == "moe_forward" else "")
    start = [row.delta, shape, str(row.tokens or "-"), row.backend or "-"]
    if row.refused:
        return [*start, "refused", *"-" * (len(HEADER) - 5)]
    rates = (row.gb_s, None) if row.memory_bound else (None, row.gflop_s)
    dense = row.dense_ms if row.dense_graph_ms is None else row.dense_graph_ms
    numbers = (row.ms, row.graph_ms, *rates, dense, row.speedup, row.of_limit)
    return [*start, *("-" if n is None else f"{n:.3g}" if n < 1000 else f"{n:.0f}" for n in numbers)]


def document(bench: Bench, rows: list[Row]) -> dict[str, Any]:
    """The machine, what was asked, and every row."""
    cuda = bench.device.type == "cuda"
    return {
        "schema": SCHEMA,
        "command": "bench",
        "quick": bench.quick,
        "backend": bench.backend,
        "device": torch.cuda.get_device_name() if cuda else f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "kind": bench.device.type,
        "threads": torch.get_num_threads(),
        "bandwidth_gb_s": float(f"{bench.bandwidth / 1e9:.4g}"),
        "versions": versions("ders-cli", "triton", "numpy", "numba") | {"torch": torch.__version__},
        "rows": [asdict(row) for row in rows],
    }
