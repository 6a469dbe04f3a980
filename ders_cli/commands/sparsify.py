"""ders sparsify"""

import re
from typing import Annotated

import typer

from .. import options as o
from ..conversion_command import convert_command
from ..errors import UsageError


def sparsify(
    model: o.MODEL,
    drop: Annotated[
        float | None, typer.Option("--drop", help="Share of entries to drop. Default: 0.9.", min=0, max=1)
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", help="random (DARE), ternary (unbiased, one value), magnitude, or N:M such as 2:4."),
    ] = "random",
    output: o.OUTPUT = None,
    base: o.BASE = None,
    seed: o.SEED = None,
    shared: o.SHARED = False,
    jobs: o.JOBS = None,
    max_memory: o.MAX_MEMORY = None,
    max_shard_size: o.SHARD_SIZE = "5GB",
    engine: o.ENGINE = "local",
    address: o.ADDRESS = None,
    scratch: o.SCRATCH = None,
    dry_run: o.DRY_RUN = False,
    overwrite: o.OVERWRITE = False,
    resume: o.RESUME = False,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Drop most entries of the deltas of a decomposed checkpoint, or of a plain MoE.

    Examples:

        ders sparsify mixtral-ders-exact --drop 0.9

        ders sparsify mixtral --method ternary --drop 0.98

        ders sparsify mixtral --method 2:4
    """
    fields = {"delta": _delta(method, drop), "base": base, "seed": seed, "shared": shared}
    run = o.RunOptions(
        jobs, max_memory, max_shard_size, dry_run, overwrite, resume, quiet, as_json, engine, address, scratch
    )
    convert_command("sparsify", model, output, fields, None, run)


def _delta(method: str, drop: float | None) -> str:
    """The --delta term for a method and a drop rate. Raises UsageError."""
    rate = 0.9 if drop is None else drop
    kept = f"{1 - rate:.9g}"
    terms = {"random": f"drop{rate:.9g}", "ternary": f"ternary{kept}", "magnitude": f"top{kept}"}
    if method in terms:
        return terms[method]
    if not re.fullmatch(r"\d+:\d+", method):
        raise UsageError(f"--method {method!r}: expected random, ternary, magnitude or N:M such as 2:4")
    if drop is not None:
        raise UsageError(f"--method {method}: says itself what is dropped; --drop does not go with it")
    return method


COMMAND = sparsify
