"""Options that several commands share, with one meaning each."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError

MODEL = Annotated[Path, typer.Argument(help="Folder of the MoE checkpoint.", show_default=False)]
OUTPUT = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder to write. Default: beside the input, named after it.")
]
BASE = Annotated[str | None, typer.Option("--base", help="mean (default), expert:N, or the folder of the dense model.")]
GROUP_SIZE = Annotated[int | None, typer.Option("--group-size", help="Inputs that share a scale. Default: 128.")]
SEED = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice. Default: 0.")]
SHARED = Annotated[bool, typer.Option("--shared", help="Put the shared (universal) expert into the group too.")]
JOBS = Annotated[int | None, typer.Option("-j", "--jobs", help="Threads. Default: one per core.", min=1, max=1024)]
MAX_MEMORY = Annotated[
    str | None,
    typer.Option("--max-memory", help="Most memory to use above an idle process, such as 2GB; fewer threads run."),
]
SHARD_SIZE = Annotated[str, typer.Option("--max-shard-size", help="Most bytes of one output file.")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Print the plan with its bytes; write nothing.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output.")]
RESUME = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no summary.")]
JSON = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@dataclass(frozen=True)
class RunOptions:
    """How a command runs, as its options say it."""

    jobs: int | None
    max_memory: str | None
    max_shard_size: str
    dry_run: bool
    overwrite: bool
    resume: bool
    quiet: bool
    as_json: bool

    def options(self) -> Any:
        """As `output.Options`. Raises UsageError for a size that is none."""
        from .output import Options

        return Options(
            self.jobs or default_jobs(),
            parse_bytes(self.max_shard_size, "--max-shard-size"),
            parse_bytes(self.max_memory, "--max-memory") if self.max_memory else None,
            self.overwrite,
            self.resume,
            self.quiet,
        )


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, option: str) -> int:
    """ "5GB" -> 5000000000. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise UsageError(f"{option} {text!r}: expected a size such as 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def default_jobs() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
