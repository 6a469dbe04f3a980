"""ders compress"""

from typing import Annotated

import typer

from .. import options as o
from ..choosing import Choosing
from ..conversion_command import convert_command
from ..errors import UsageError


def compress(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of the MoE checkpoint, or its address: hf://org/model[@revision], s3://, gs://, https://.",
            show_default=False,
        ),
    ] = None,
    delta: Annotated[
        str | None,
        typer.Option(
            "--delta",
            help="exact, int8 ... int1, dropP, ternaryK, topK, N:M, rankR, or a chain a+b. Default: int4. With a budget: what "
            "it chooses from, such as int4,int2,ternary0.02.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="A YAML file, or a published recipe: lossless, int4, onebit, subbit, paper-drop90."
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            help="Instead of MODEL: a text file with a model a line, or a glob in quotes, such as 'models/*'. -o is a folder.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="The best mix of codecs for this size: bits per delta weight such as 1.5bpw, or bytes of the whole output "
            "such as 12GB.",
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            help="The smallest mix whose predicted relative error of the experts' outputs is at most this, such as 0.01.",
        ),
    ] = None,
    align: Annotated[
        bool,
        typer.Option("--align", help="First bring the experts' neurons into one order; restore puts them back."),
    ] = False,
    calibrate: o.CALIBRATE = None,
    activations: o.ACTIVATIONS = None,
    tokens: o.TOKENS = None,
    output: o.OUTPUT = None,
    base: o.BASE = None,
    group_size: o.GROUP_SIZE = None,
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
    """Store a MoE's experts as one base and light deltas.

    Examples:

        ders compress mixtral --delta int4

        ders compress mixtral --delta exact --base mistral-7b

        ders compress mixtral --delta drop0.9+int4 -o small --dry-run

        ders compress mixtral --recipe subbit

        ders compress mixtral --budget 0.5bpw --dry-run

        ders compress mixtral --delta int3 --calibrate text.txt

        ders compress --batch 'models/*' --delta int4 -o small
    """
    if (model is None) == (batch is None):
        raise UsageError(
            "expected MODEL, or --batch with a list of models"
            if model is None
            else f"--batch {batch} and a MODEL: expected one of the two; a glob goes in quotes"
        )
    spends = budget is not None or max_loss is not None
    if spends and recipe is not None:
        raise UsageError(
            f"--recipe {recipe} and a budget: expected one of the two; --base, --group-size and --seed go with a budget"
        )
    candidates = tuple(delta.split(",")) if spends and delta is not None else ()
    choosing = Choosing(budget, max_loss, candidates, align, calibrate, activations, tokens)
    if spends or (delta is None and recipe is None):
        delta = "int4"  # with a budget it only stands there until its own recipe is known
    fields = {
        "delta": delta,
        "base": base,
        "group_size": group_size,
        "seed": seed,
        "shared": shared,
    }
    run = o.RunOptions(
        jobs, max_memory, max_shard_size, dry_run, overwrite, resume, quiet, as_json, engine, address, scratch
    )
    if batch is None:
        return convert_command("compress", model, output, fields, recipe, run, choosing)
    if choosing:
        raise UsageError(
            "--batch takes no --budget, --max-loss, --align, --calibrate, --activations or --tokens: each is of one model"
        )
    from ..batch import run_batch

    raise typer.Exit(run_batch("compress", batch, output, fields, recipe, run))


COMMAND = compress
