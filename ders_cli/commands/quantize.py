"""ders quantize"""

from typing import Annotated

import typer

from .. import options as o
from ..choosing import Choosing
from ..conversion_command import convert_command


def quantize(
    model: o.MODEL,
    bits: Annotated[int, typer.Option("--bits", help="Bits of each delta entry.", min=1, max=8)] = 4,
    output: o.OUTPUT = None,
    base: o.BASE = None,
    group_size: o.GROUP_SIZE = None,
    seed: o.SEED = None,
    shared: o.SHARED = False,
    calibrate: o.CALIBRATE = None,
    activations: o.ACTIVATIONS = None,
    tokens: o.TOKENS = None,
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
    """Quantise the deltas of a decomposed checkpoint, or of a plain MoE.

    Examples:

        ders quantize mixtral-ders-exact --bits 4

        ders quantize mixtral --bits 1 --group-size 64 -o mixtral-1bit

        ders quantize mixtral --bits 3 --calibrate text.txt
    """
    fields = {"delta": f"int{bits}", "base": base, "group_size": group_size, "seed": seed, "shared": shared}
    choosing = Choosing(calibrate=calibrate, activations=activations, tokens=tokens)
    run = o.RunOptions(
        jobs, max_memory, max_shard_size, dry_run, overwrite, resume, quiet, as_json, engine, address, scratch
    )
    convert_command("quantize", model, output, fields, None, run, choosing)


COMMAND = quantize
