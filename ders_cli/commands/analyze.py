"""ders analyze"""

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import options as o
from ..errors import UsageError
from ..report import say
from .report import write_pictures


def analyze(
    model: o.MODEL,
    base: o.BASE = None,
    delta: Annotated[
        list[str] | None,
        typer.Option(
            "--delta",
            help="A codec to predict; may be repeated. Default: exact, int8, int4, int2, int1 and three below 0.5 bit.",
        ),
    ] = None,
    group_size: o.GROUP_SIZE = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", help="A text that the model is run on: predict outputs for what its experts see of it."),
    ] = None,
    activations: o.ACTIVATIONS = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Hidden states per layer.", min=1, max=65536)] = 32,
    seed: o.SEED = None,
    shared: o.SHARED = False,
    write_recipe: Annotated[
        Path | None,
        typer.Option("--write-recipe", help="Write the recommended recipe here; `ders compress --recipe` takes it."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with figures here.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write a picture here: a name that ends in .png, .pdf or .svg.")
    ] = None,
    jobs: o.JOBS = None,
    scratch: o.SCRATCH = None,
    quiet: o.QUIET = False,
    as_json: o.JSON = False,
) -> None:
    """Is a model worth converting, and how? Reads the experts once, and writes nothing but what is asked for.

    Says what the experts are to each other, what each codec would take in bytes and cost in output error, and recommends
    a recipe. Errors are predicted from samples; bytes are those that a conversion writes. docs/analyze.md explains all
    numbers.

    Examples:

        ders analyze mixtral

        ders analyze mixtral --base mistral-7b --write-recipe mixtral.yaml

        ders compress mixtral --recipe mixtral.yaml

        ders analyze mixtral --delta int4 --delta int3 --text wikitext.txt --html mixtral.html

        ders analyze mixtral --json > mixtral.json
    """
    from ..analysis.analyze import TERMS, Asked
    from ..analysis.analyze import analyze as action
    from ..report import print_json
    from ..reports.show import print_document
    from ..source import open_source

    if text is not None and activations is not None:
        raise UsageError("--text and --activations: expected one of the two; both say what the experts see")
    for path, option in ((text, "--text"), (activations, "--activations")):
        if path is not None and not path.is_file():
            raise UsageError(f"{option} {path}: no such file")
    asked = Asked(
        base or "mean",
        tuple(delta or TERMS),
        128 if group_size is None else group_size,
        seed or 0,
        tokens,
        text,
        activations,
        jobs or o.default_jobs(),
        quiet,
        scratch,
    )
    with open_source(model, shared, scratch) as source:
        document = action(source, asked)
    if write_recipe is not None:
        _write_recipe(document["recommended"], write_recipe)
        if document["verdict"]["kind"] == "permuted" and document["recommended"]["recipe"]:
            say(f"note: {write_recipe} goes with --align, which is no part of a recipe")
    write_pictures(document, html, plot)
    if as_json:
        print_json(document)
    elif not quiet:
        print_document(document)
    else:
        print(document["verdict"]["kind"])


def _write_recipe(recommended: dict[str, Any], path: Path) -> None:
    import yaml

    from ..checkpoint.manifest import write_file

    if recommended["recipe"] is None:
        say(f"note: {path} is not written: {recommended['says']}")
        return
    text = f"# {recommended['says']}\n" + yaml.safe_dump(recommended["recipe"], sort_keys=False)
    write_file(path, text.encode())


COMMAND = analyze
