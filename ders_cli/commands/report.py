"""ders report"""

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o


def report(
    report: Annotated[
        str,
        typer.Argument(
            help="A report's JSON file, as `ders analyze --json` prints one, or a DeRS folder or its address.",
            show_default=False,
        ),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with figures here; it needs no network.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a picture here: a name that ends in .png, .pdf or .svg.")
    ] = None,
    scratch: o.SCRATCH = None,
    as_json: o.JSON = False,
) -> None:
    """Show an analysis that was kept, or what a DeRS folder says of itself. No weights are read.

    Figures need an extra: pip install 'ders-cli[report]'.

    Examples:

        ders report analysis.json --html analysis.html

        ders report mixtral-ders-int4 --plot plan.pdf

        ders report mixtral-ders-int4 --json > conversion.json
    """
    from ..report import print_json
    from ..reports.conversion import open_report
    from ..reports.show import print_document

    document = open_report(report, scratch)
    written = write_pictures(document, html, plot)
    if as_json:
        print_json(document)
    elif written:
        print(*written, sep="\n")
    else:
        print_document(document)


def write_pictures(document: dict, html: Path | None, plot: Path | None) -> list[Path]:
    """The page and the picture that were asked for. Raises UsageError where the extra is missing."""
    if html is not None:
        from ..pictures.html import write_html

        write_html(document, html)
    if plot is not None:
        from ..pictures.plot import write_plot

        write_plot(document, plot)
    return [path for path in (html, plot) if path is not None]


COMMAND = report
