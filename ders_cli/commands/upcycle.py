"""ders upcycle"""

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o
from ..upcycle_command import upcycle_command

DENSE = Annotated[
    str,
    typer.Argument(help="Folder of the dense checkpoint, or its address: hf://, s3://, https://.", show_default=False),
]


def upcycle(
    dense: DENSE,
    experts: Annotated[
        int | None, typer.Option("--experts", help="Experts of a layer. Default: 4.", min=1, max=4096)
    ] = None,
    experts_per_layer: Annotated[
        str | None, typer.Option("--experts-per-layer", help="Experts by parts of the depth, such as 2-4-6-8.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="To be trained: low-rank deltas of this rank (DeRS-LM).", min=1)
    ] = None,
    sparse: Annotated[
        float | None, typer.Option("--sparse", help="To be trained: a random share 1 - P of each delta (DeRS-SM).")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Full copies: the stock MoE, which transformers loads by itself.")
    ] = False,
    expert_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--expert-from", help="A fine-tune of DENSE, or a LoRA adapter on its FFN: becomes an expert. Repeat."
        ),
    ] = None,
    delta: Annotated[
        str | None, typer.Option("--delta", help="How fine-tunes' deltas are stored, as in compress. Default: exact.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Experts that a token goes to. Default: 2.", min=1)
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="Layers that get experts: all, even, odd, or such as 0-3,31.")
    ] = "all",
    split: Annotated[
        int,
        typer.Option("--split", help="Cut each expert into this many finer ones; the function stays.", min=1, max=4096),
    ] = 1,
    router: Annotated[
        str, typer.Option("--router", help="normal, zero, or a YAML file with prompts for each expert.")
    ] = "normal",
    noise: Annotated[
        float,
        typer.Option("--noise", help="With --full: normal noise on each copy, in root mean squares of its row.", min=0),
    ] = 0.0,
    average_others: Annotated[
        bool, typer.Option("--average-others", help="Weights outside the FFN: the fine-tunes' mean, not DENSE's.")
    ] = False,
    output: o.OUTPUT = None,
    group_size: o.GROUP_SIZE = None,
    seed: o.SEED = None,
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
    """Make a Mixture-of-Experts of a dense model. At the start it computes what the dense model computes.

    Examples:

        ders upcycle smollm2 --experts 4 --rank 16

        ders upcycle smollm2 --experts 8 --top-k 2 --full -o smollm2-8x

        ders upcycle smollm2 --expert-from python --expert-from french --router prompts.yaml

        ders upcycle smollm2 --experts 2 --split 4 --sparse 0.99 --dry-run
    """
    upcycle_command(
        dense,
        output,
        experts,
        experts_per_layer,
        rank,
        sparse,
        full,
        expert_from or [],
        delta,
        top_k,
        layers,
        split,
        router,
        noise,
        average_others,
        group_size,
        seed or 0,
        o.RunOptions(
            jobs, max_memory, max_shard_size, dry_run, overwrite, resume, quiet, as_json, engine, address, scratch
        ),
    )


COMMAND = upcycle
