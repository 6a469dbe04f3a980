"""ders bench"""

from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from .. import options as o
from ..backends import BACKEND, Backend, Device, choices_shown

COMMAND = typer.Typer(invoke_without_command=True)


@COMMAND.callback()
@COMMAND.command()
def kernels(
    context: typer.Context,
    backend: BACKEND = Backend.auto,
    device: Annotated[
        Device, typer.Option("--device", help="Where to run; auto: cuda if there is a GPU.")
    ] = Device.auto,
    quick: Annotated[bool, typer.Option("--quick", help="One small shape: does everything run? Seconds.")] = False,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Time the kernels on this machine, beside torch's dense product and the memory's bandwidth.

    Needs torch. Inputs are random; no checkpoint is read. Minutes; on a GPU with CUDA graphs as well as eager.
    `ders bench convert` times conversions instead.

    Examples:

        ders bench --quick

        ders bench --backend triton --json > bench.json

        ders bench convert --delta int4
    """
    from ..errors import UsageError

    if context.invoked_subcommand:
        return
    try:
        from ..bench import Bench
        from ..bench_report import document, print_rows
        from ..report import print_json
    except ImportError as error:
        raise UsageError(f"bench: {error}; pip install torch") from None
    with choices_shown(quiet):
        run, rows = Bench(backend, device, quick), []
        for _, found in groupby(run.run(), key=lambda row: row.op):
            rows += (own := list(found))
            if not as_json:
                print_rows(own)
    if as_json:
        print_json(document(run, rows))


@COMMAND.command()
def convert(
    model: Annotated[
        Path | None,
        typer.Argument(help="Folder of a plain MoE checkpoint. Default: a synthetic one is made.", show_default=False),
    ] = None,
    delta: Annotated[
        list[str] | None, typer.Option("--delta", help="A codec; may be repeated. Default: one of each kind.")
    ] = None,
    jobs: o.JOBS = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Runs of everything; medians count.", min=1, max=99)] = 3,
    gigabytes: Annotated[
        float, typer.Option("--gigabytes", help="Size of the synthetic model, in 1e9 bytes.", min=0.1, max=1000)
    ] = 1.0,
    scratch: Annotated[
        Path | None,
        typer.Option("--scratch", help="Folder, on the disk to measure. Default: beside MODEL, or the system's own."),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Drop the input from the page cache before each run; the disk's own rates.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny model, one round: does it run? Seconds.")] = False,
    as_json: o.JSON = False,
) -> None:
    """Time compress, restore and verify on this machine, beside their I/O alone and their computing alone.

    No torch. Writes up to four times the model's size into a folder of its own, removed at the end. Minutes.

    Examples:

        ders bench convert --quick

        ders bench convert --delta int4 --delta exact --scratch /mnt/nvme --cold

        ders bench convert mixtral --delta int4 --json > convert.json
    """
    from ..bench_convert import DELTAS, ConvertBench
    from ..bench_convert_report import document, print_machine, print_rows, print_stages, print_start
    from ..report import print_json

    deltas, rows, found = tuple(delta or DELTAS), [], {}
    with ConvertBench(model, deltas, jobs or o.default_jobs(), rounds, gigabytes, scratch, cold, quick) as bench:
        if not as_json:
            print_machine(bench)
        start = bench.start_up()
        for each in deltas:
            rows += (own := list(bench.rows(each)))
            found[each] = bench.stages(each)
            if not as_json:
                print_rows(own, cold)
        if as_json:
            print_json(document(bench, start, rows, found))
        else:
            print_stages(found)
            print_start(start)
