"""The rows of `ders bench convert`: for a person two tables, for a program one document."""

import os
from dataclasses import asdict
from typing import Any

from .bench_convert import ConvertBench, Row, Times
from .bench_machine import processor, versions
from .bench_stages import STAGES
from .report import human_bytes, print_table

SCHEMA = 1
HEADER = ["", "delta", "whole GB/s", "I/O GB/s", "ratio", "compute GB/s", "CPU-s/GB whole", "I/O", "compute"]
COLD = ["read GB/s", "write GB/s", "of limit"]


def print_machine(bench: ConvertBench) -> None:
    """What is measured, and where."""
    what = "synthetic Mixtral-shaped model" if bench.synthetic else str(bench.model)
    pages = "input's pages dropped before each run" if bench.cold else "page cache warm"
    print(f"{what}, {human_bytes(bench.bytes)} of experts; {bench.jobs} threads, {bench.rounds} rounds, {pages}")
    print(f"{processor()}, {os.cpu_count()} cores; {bench.disk} ({bench.folder.parent})")


def print_rows(rows: list[Row], cold: bool) -> None:
    """GB: 1e9 bytes of expert weights, whichever way they go."""
    header = HEADER + (COLD if cold else [])
    print_table("", header, [_line(row, cold) for row in rows])
    for row in rows:
        if row.missed:
            print(f"  - {row.missed}: its ratio is no lower bound")


def _line(row: Row, cold: bool) -> list[str]:
    rates = [_rate(row, times) for times in (row.whole, row.twin)]
    each = [times and times.cpu_s / row.bytes * 1e9 for times in (row.whole, row.twin, row.compute)]
    numbers = [*rates, row.ratio, _rate(row, row.compute), *each]
    if cold:
        numbers += [_rate(row, row.read_alone), _rate(row, row.write_alone), row.of_limit]
    return [row.command, row.delta, *("-" if number is None else f"{number:.3g}" for number in numbers)]


def print_stages(found: dict[str, dict[str, float]]) -> None:
    """One thread, each stage alone."""
    title = "CPU-s/GB of each stage alone, on one thread"
    rows = [[delta, *(f"{own[stage]:.3g}" for stage in STAGES)] for delta, own in found.items()]
    print_table(title, ["delta", *STAGES], rows)


def print_start(start: Times) -> None:
    print(f"start-up, apart: {start.wall_s:.2f} s, {start.cpu_s:.2f} CPU-s (a fresh `ders compress` of a tiny model)")


def document(bench: ConvertBench, start: Times, rows: list[Row], found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The machine, what was asked, every row, and every stage."""
    return {
        "schema": SCHEMA,
        "command": "bench convert",
        "quick": bench.quick,
        "model": "synthetic" if bench.synthetic else str(bench.model),
        "bytes": bench.bytes,
        "jobs": bench.jobs,
        "rounds": bench.rounds,
        "cold": bench.cold,
        "processor": processor(),
        "cores": os.cpu_count(),
        "disk": bench.disk,
        "versions": versions("ders-cli", "numpy", "numba", "blake3"),
        "start_up": _rounded(asdict(start)),
        "rows": [_entry(row) for row in rows],
        "stages": {delta: _rounded(own) for delta, own in found.items()},
    }


def _entry(row: Row) -> dict[str, Any]:
    entry = asdict(row)
    for name in ("whole", "twin", "compute", "read_alone", "write_alone"):
        times = getattr(row, name)
        if times is not None:
            rates = {"gb_s": _rate(row, times), "cpu_s_per_gb": times.cpu_s / row.bytes * 1e9}
            entry[name] = _rounded(entry[name] | rates)
    return entry | {
        "ratio": _digits(row.ratio),
        "of_limit": row.of_limit and _digits(row.of_limit),
        "missed": row.missed,
    }


def _rate(row: Row, times: Times | None) -> float | None:
    return None if times is None else row.bytes / 1e9 / times.wall_s


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: _digits(number) for name, number in numbers.items()}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
