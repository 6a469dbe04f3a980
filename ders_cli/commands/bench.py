"""ders bench"""

import json
from itertools import groupby
from typing import Annotated

import typer

from .. import options as o
from ..backends import BACKEND, Backend, Device, choices_shown


def bench(
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

    Examples:

        ders bench --quick

        ders bench --backend triton --json > bench.json
    """
    from ..errors import UsageError

    try:
        from ..bench import Bench
        from ..bench_report import document, print_rows
    except ImportError as error:
        raise UsageError(f"bench: {error}; pip install torch") from None
    with choices_shown(quiet):
        run, rows = Bench(backend, device, quick), []
        for _, found in groupby(run.run(), key=lambda row: row.op):
            rows += (own := list(found))
            if not as_json:
                print_rows(own)
    if as_json:
        print(json.dumps(document(run, rows), indent=1))


COMMAND = bench
