"""ders verify"""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from .. import options as o
from ..backends import OPTIONAL_BACKEND, choices_shown
from ..errors import DersError, UsageError


def verify(
    model: o.MODEL,
    reference: Annotated[
        str | None, typer.Argument(help="Checkpoint to compare with; the same as --against.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Checkpoint to compare with: the original, or any MoE of the same model."),
    ] = None,
    max_error: Annotated[
        float | None, typer.Option("--max-error", help="Bound on each matrix's relative Frobenius error.", min=0)
    ] = None,
    max_output_error: Annotated[
        float | None,
        typer.Option("--max-output-error", help="Bound on each expert's relative FFN output error.", min=0),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option("--min-cosine", help="Bound on each matrix's cosine.", min=-1, max=1)
    ] = None,
    hidden: Annotated[
        Path | None,
        typer.Option(
            "--hidden", help="Real hidden states: safetensors with `layers.N` or `hidden_states`, [tokens, hidden]."
        ),
    ] = None,
    output: Annotated[bool, typer.Option("--output/--no-output", help="Measure the FFN's output error too.")] = True,
    tokens: Annotated[int, typer.Option("--tokens", help="Random hidden states per layer.", min=1, max=4096)] = 16,
    backend: OPTIONAL_BACKEND = None,
    shared: o.SHARED = False,
    seed: o.SEED = None,
    jobs: o.JOBS = None,
    scratch: o.SCRATCH = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML here.")] = None,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Prove a conversion: a DeRS checkpoint by itself, or any two MoE checkpoints against each other.

    Exit code 0: all well; 3: a difference, or a bound passed; 4: a checkpoint is broken.

    Examples:

        ders verify mixtral-ders-int4

        ders verify mixtral-ders-int4 --against mixtral --max-output-error 0.05

        ders verify mixtral-ders-int4 --against mixtral --backend triton

        ders verify their-mixtral our-mixtral --junit verify.xml
    """
    from .. import verify as action
    from ..junit import write_junit
    from ..report import print_json
    from ..source import open_source
    from ..verify_report import print_report

    if reference is not None and against is not None:
        raise UsageError(f"two references: {reference} and --against {against}; expected one")
    reference, bounds = reference or against, action.Bounds(max_error, max_output_error, min_cosine)
    if bounds.given and reference is None:
        raise UsageError("bounds are on the difference from a reference; give it by --against")
    try:
        with (
            open_source(model, shared, scratch) as tested,
            open_source(reference, shared or tested.shared, scratch) if reference else nullcontext() as other,
            choices_shown(quiet),
        ):
            report = action.verify(
                tested, other, bounds, hidden, output, tokens, seed or 0, jobs or o.default_jobs(), quiet, backend
            )
    except DersError as error:
        if junit:
            write_junit(junit, {}, str(error))
        raise
    if junit:
        write_junit(junit, report.checks)
    if as_json:
        print_json(report.document())
    else:
        print_report(report, quiet)
    if report.findings:
        raise typer.Exit(3)


COMMAND = verify
