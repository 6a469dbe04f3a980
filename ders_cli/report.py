"""What a person sees: sizes in words, tables, and progress on stderr where it is a terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


def human_bytes(count: float) -> str:
    """1536 -> "1.5 kB"; decimal units, as disks and Hugging Face count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


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
    import sys

    if quiet or not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Drawn(bar, bar.add_task(title, total=total))


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """One table on stdout; the first column left, the others right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if _is_terminal() else 160).print(table)


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()
