"""ders demo"""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import options as o
from ..errors import UsageError

SCHEMA = 1


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the models that the demo makes (about 3 GB).")
    ] = Path("ders-demo"),
    steps: Annotated[int, typer.Option("--steps", help="Training steps of each expert.", min=1)] = 15,
    seed: o.SEED = None,
    jobs: o.JOBS = None,
    overwrite: o.OVERWRITE = False,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Make a real small MoE, convert it four ways, verify, restore, and print size and loss of each.

    Takes three to five minutes on two cores. The experts' training is short: enough to show what conversion keeps.

    Examples:

        ders demo

        ders demo --steps 60 -o /scratch/demo
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin at barriers starve on a shared machine
    from ..demonstration import demonstrate, table
    from ..report import print_json, print_table

    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UsageError(f"{output}: exists and is not empty; --overwrite replaces the demo's models in it")
    output.mkdir(parents=True, exist_ok=True)
    for folder in [output / "dense", *output.glob("moe*")]:
        shutil.rmtree(folder, ignore_errors=True)

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    result = demonstrate(output, steps, seed or 0, jobs or o.default_jobs(), say)
    if as_json:
        print_json({"schema": SCHEMA, "command": "demo", **result})
        return
    training = result["training"]
    print_table("ders demo", *table(result))
    print(
        f"Loss: nats per token, mean over {len(result['kinds'])} experts, each on unseen text of its kind ({', '.join(result['kinds'])})."
    )
    print(
        f"Training was short: {training['steps']} steps of {training['tokens_per_step']} tokens an expert. "
        f"All in all {result['seconds'] / 60:.1f} minutes. Models are in {output}."
    )


COMMAND = demo
