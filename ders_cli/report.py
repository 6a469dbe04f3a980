"""What a person sees: sizes in words, tables, and progress on stderr where it is a terminal."""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any


def human_bytes(count: float) -> str:
    """1536 -> "1.5 kB"; decimal units, as disks and Hugging Face count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def visible(text: str) -> str:
    """A stranger's text for a terminal or a log: what is no letter, but moves the cursor, breaks the line, turns the writing
    round or cannot be encoded, as its escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """One line on stderr, `ders: TEXT`, with everything in it visible."""
    _tell(f"ders: {visible(text)}")


def say_traceback() -> None:
    """The traceback of the error that is being handled, on stderr."""
    _tell("\n".join(visible(line) for line in traceback.format_exc().splitlines()))


def _tell(text: str) -> None:
    """That nobody reads stderr any more, or that its disk is full, is no reason to stop or to end with another exit code."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        mute(2)


def mute(number: int) -> None:
    """What is still to be written to stdout (1) or stderr (2) is thrown away: at exit Python would fail with it again."""
    if (sys.stdout, sys.stderr)[number - 1] is (sys.__stdout__, sys.__stderr__)[number - 1]:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


class Progress:
    """Bytes done out of a total. Silent unless a subclass or `shown` draws it; safe to call from threads."""

    drawn = False  # somebody looks

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""


class _Drawn(Progress):
    drawn = True

    def __init__(self, bar: object, task: object):
        self._bar, self._task, self._lock, self._held, self._last = bar, task, Lock(), 0, 0.0

    def advance(self, count: int) -> None:
        with self._lock:
            self._held += count
            if time.monotonic() - self._last > 0.1:
                self._bar.update(self._task, advance=self._held)
                self._held, self._last = 0, time.monotonic()


@contextmanager
def shown(title: str, total: int, quiet: bool) -> Iterator[Progress]:
    """A bar with rate and time left on stderr; nothing where stderr is no terminal or `quiet` is set."""
    if quiet or not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Drawn(bar, bar.add_task(title, total=total))


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """One table on stdout; the first column left, the others right. Cells are text: nothing in them is markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)), title_justify="left", title_style="bold")
    for number, name in enumerate(header):
        table.add_column(Text(visible(name)), justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))  # as it is: "[red]" is a name, no colour
    Console(width=None if _is_terminal() else 160).print(table)


def bar(share: float, width: int = 10) -> str:
    """A share of 1 as a bar of `width` characters, in eighths: bar(0.3, 4) -> "█▏░░". Beyond 0..1 it is empty or full; of no
    number, "-". What is empty is drawn: a table strips spaces."""
    if not math.isfinite(share):
        return "-"
    eighths = round(min(max(share, 0.0), 1.0) * 8 * width)
    rest = "" if eighths % 8 == 0 else chr(0x2590 - eighths % 8)  # U+258F is one eighth, U+2589 seven
    return ("█" * (eighths // 8) + rest).ljust(width, "░")


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout. A number that JSON does not have, infinite or none, is null."""
    print(json.dumps(finite(document), indent=1, allow_nan=False))


def finite(value: Any) -> Any:
    """The same with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_terminal() -> bool:
    return sys.stdout.isatty()
