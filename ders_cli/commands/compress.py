"""ders compress"""

from typing import Annotated

import typer

from .. import options as o
from ..conversion_command import convert_command


def compress(
    model: o.MODEL,
    delta: Annotated[
        str | None,
        typer.Option(
            "--delta", help="exact, int8 ... int1, dropP, ternaryK, topK, N:M, rankR, or a chain a+b. Default: int4."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="A YAML file, or a published recipe: lossless, int4, onebit, subbit, paper-drop90."
        ),
    ] = None,
    output: o.OUTPUT = None,
    base: o.BASE = None,
    group_size: o.GROUP_SIZE = None,
    seed: o.SEED = None,
    shared: o.SHARED = False,
    jobs: o.JOBS = None,
    max_memory: o.MAX_MEMORY = None,
    max_shard_size: o.SHARD_SIZE = "5GB",
    dry_run: o.DRY_RUN = False,
    overwrite: o.OVERWRITE = False,
    resume: o.RESUME = False,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Store a MoE's experts as one base and light deltas.

    Examples:

        ders compress mixtral --delta int4

        ders compress mixtral --delta exact --base mistral-7b

        ders compress mixtral --delta drop0.9+int4 -o small --dry-run

        ders compress mixtral --recipe subbit
    """
    fields = {
        "delta": "int4" if delta is None and recipe is None else delta,
        "base": base,
        "group_size": group_size,
        "seed": seed,
        "shared": shared,
    }
    run = o.RunOptions(jobs, max_memory, max_shard_size, dry_run, overwrite, resume, quiet, as_json)
    convert_command("compress", model, output, fields, recipe, run)


COMMAND = compress
