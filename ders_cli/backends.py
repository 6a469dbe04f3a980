"""--backend: which kernels run, and what was taken, said once on stderr."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer


class Backend(StrEnum):
    """Those of ders_kernels.dispatch, which isn't imported for a help text; tests/test_dispatch.py holds them together."""

    auto = "auto"
    triton = "triton"
    cpu = "cpu"
    reference = "reference"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


HELP = "Kernels: triton (GPU), cpu, reference (plain torch, slow), or auto, which takes the first that runs."
BACKEND = Annotated[Backend, typer.Option("--backend", help=HELP)]
OPTIONAL_BACKEND = Annotated[
    Backend | None, typer.Option("--backend", help=f"Run the experts through kernels, packed as they are. {HELP}")
]


@contextmanager
def choices_shown(quiet: bool) -> Iterator[None]:
    """What `auto` takes and why, on stderr."""
    log, handler = logging.getLogger("ders_kernels.dispatch"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("ders: %(message)s"))
    level = log.level
    if not quiet:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
