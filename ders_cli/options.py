"""Options that several commands share, with one meaning each."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError

MODEL = Annotated[
    str,
    typer.Argument(
        help="Folder of the MoE checkpoint, or its address: hf://org/model[@revision], s3://, gs://, https://.",
        show_default=False,
    ),
]
OUTPUT = Annotated[
    str | None,
    typer.Option("-o", "--output", help="Folder, s3:// or gs:// to write. Default: beside the input, named after it."),
]
BASE = Annotated[
    str | None, typer.Option("--base", help="mean (default), expert:N, or the dense model: a folder or an address.")
]
SCRATCH = Annotated[
    Path | None,
    typer.Option(
        "--scratch",
        help="Folder for what is fetched of a remote model, and for an upload. Default: the system's temporary one.",
    ),
]
GROUP_SIZE = Annotated[int | None, typer.Option("--group-size", help="Inputs that share a scale. Default: 128.")]
SEED = Annotated[int | None, typer.Option("--seed", help="Seed of every random choice. Default: 0.")]
SHARED = Annotated[bool, typer.Option("--shared", help="Put the shared (universal) expert into the group too.")]
JOBS = Annotated[
    int | None,
    typer.Option(
        "-j",
        "--jobs",
        help="Threads; with --engine ray of one output file's job. Default: one per core, with ray at most 8.",
        min=1,
        max=1024,
    ),
]
RAY_JOBS = 8
MAX_MEMORY = Annotated[
    str | None,
    typer.Option("--max-memory", help="Most memory to use above an idle process, such as 2GB; fewer threads run."),
]
SHARD_SIZE = Annotated[str, typer.Option("--max-shard-size", help="Most bytes of one output file.")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Print the plan with its bytes; write nothing.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output.")]
RESUME = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, no summary.")]
ENGINE = Annotated[str, typer.Option("--engine", help="Where output files are made: local, or ray (a Ray cluster).")]
ADDRESS = Annotated[
    str | None,
    typer.Option("--address", help="The Ray cluster: auto or HOST:PORT. Default: RAY_ADDRESS, or a Ray started here."),
]
CALIBRATE = Annotated[
    Path | None,
    typer.Option(
        "--calibrate",
        help="A text: int and rank deltas are fitted to what the experts see of it (runs the model; extra [hf]).",
    ),
]
ACTIVATIONS = Annotated[
    Path | None,
    typer.Option("--activations", help="A safetensors file with what the experts see, instead of a text."),
]
TOKENS = Annotated[
    int | None,
    typer.Option("--tokens", help="Tokens of --calibrate's text to use. Default: 4096.", min=1, max=1_000_000),
]
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
    engine: str = "local"
    address: str | None = None
    scratch: Path | None = None

    def options(self) -> Any:
        """As `output.Options`. Raises UsageError for a size that is none, and for an engine that isn't there."""
        from .engines import find_engine
        from .output import Options

        run_shards = find_engine(self.engine, self.address, default_jobs(), self.jobs is not None)
        # a node runs several of Ray's jobs at once
        cores = min(RAY_JOBS, default_jobs()) if self.engine == "ray" else default_jobs()
        return Options(
            self.jobs or cores,
            parse_bytes(self.max_shard_size, "--max-shard-size"),
            parse_bytes(self.max_memory, "--max-memory") if self.max_memory else None,
            self.overwrite,
            self.resume,
            self.quiet,
            run_shards=run_shards,
            scratch=self.scratch,
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
