"""ders diff"""

from typing import Annotated

import typer

from .. import options as o

REPORT = "A report's JSON file (`ders analyze --json`, `ders report --json`), or a DeRS folder or its address."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=REPORT, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one.", show_default=False)],
    every: Annotated[bool, typer.Option("--all", help="Every line of every table. Default: the 12 largest.")] = False,
    scratch: o.SCRATCH = None,
    as_json: o.JSON = False,
) -> None:
    """Compare two reports: verdicts, bytes, codecs, plans, and the numbers that moved most.

    Exit code 0 whatever differs: this is a viewer. `ders verify` is the judge.

    Examples:

        ders diff before.json after.json

        ders diff mixtral-ders-int4 mixtral-ders-int8

        ders diff analysis.json mixtral-ders-int4
    """
    from ..report import print_json
    from ..reports.conversion import open_report
    from ..reports.differences import differences
    from ..reports.show_differences import print_differences

    found = differences(open_report(a, scratch), open_report(b, scratch))
    if as_json:
        print_json(found.document())
    else:
        print_differences(found, every)


COMMAND = diff
