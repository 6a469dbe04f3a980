"""The command line: finds commands/, turns a DersError into one line and an exit code.

Exit codes: 0 done, 1 failure, 2 usage or recipe, 3 verify found a difference or a bound was passed, 4 checkpoint
broken or architecture unsupported, 130 interrupted. Nothing heavy is imported until a command runs.
"""

import json
import os
import signal
import sys
from typing import Annotated

import typer

from . import __version__, commands
from .errors import DersError, Interrupted, in_words
from .registry import discover
from .report import mute, say, say_traceback, visible

SCHEMA = 1
INTERRUPTED = 130
LOADING = ("failed to map segment", "Could not find/load shared object")  # where a library finds no room
CONTEXT = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="ders",
    no_args_is_help=True,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="One shared base and light deltas for the experts of an upcycled Mixture-of-Experts checkpoint.",
)


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"ders-cli {__version__}")
        raise typer.Exit()


for _name, _command in discover(commands, "COMMAND").items():
    if isinstance(_command, typer.Typer):  # it has commands of its own
        app.add_typer(_command, name=_name, context_settings=CONTEXT)
    else:
        app.command(_name, context_settings=CONTEXT)(_command)


_interrupted: list[int] = []  # signals of this run
_said: list[str] = []  # what its error was


def _interrupt(number: int, frame: object) -> None:
    """The first signal unwinds the command; the next one, if that takes too long or was lost on the way, ends it at once."""
    _interrupted.append(number)
    if len(_interrupted) == 1:
        raise Interrupted
    try:
        if not _said:
            os.write(2, b"ders: interrupted again, and ended at once\n")
    finally:  # even where nobody reads stderr any more
        os._exit(INTERRUPTED)


def main() -> None:
    """Run the command line in this process, and end it. `__main__` is the entry point."""
    _interrupted.clear()
    _said.clear()
    debug = "--debug" in sys.argv[1:]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            app()
        except SystemExit as stop:
            if stop.code == 2 and "--json" in sys.argv:  # Typer has said on stderr what is wrong with the command line
                print(json.dumps({"schema": SCHEMA, "error": {"message": "usage: see stderr", "exit_code": 2}}))
            sys.stdout.flush()
            raise
    except DersError as error:
        _fail(str(error), error.exit_code, debug)
    except Interrupted:
        _fail("interrupted; an unfinished output keeps the name OUT.partial, --resume continues it", INTERRUPTED, debug)
    except BrokenPipeError as error:
        if error.filename is not None:
            raise
        mute(1)  # whoever read our output has gone: nobody is there to tell
        sys.exit(128 + signal.SIGPIPE)
    except ImportError as error:
        _fail(f"{error}; too little memory to load it (`ulimit -v`), or ders-cli is not installed whole", 1, debug)
    except OSError as error:
        if error.filename is None and error.errno is None:
            if not any(words in str(error) for words in LOADING):
                raise
            _fail(f"{error}; too little memory to load it (`ulimit -v`)", 1, debug)
        _fail(in_words(error), 1, debug)
    except MemoryError:
        _fail("out of memory; fewer --jobs need less", 1, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    """One line on stderr, one document on stdout for --json, and the exit code."""
    if debug:
        say_traceback()
    message = visible(message)
    say(message)
    _said.append(message)
    try:
        if "--json" in sys.argv:
            print(json.dumps({"schema": SCHEMA, "error": {"message": message, "exit_code": code}}))
        sys.stdout.flush()
    except OSError:
        mute(1)
    if code == INTERRUPTED:
        os._exit(code)  # worker threads may still hold blocks; there is nothing to save
    sys.exit(code)
