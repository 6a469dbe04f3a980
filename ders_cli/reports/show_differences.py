"""The differences of two reports for a person: a few tables, the largest changes first."""

from collections import Counter
from typing import Any

from ..report import human_bytes, print_table, visible
from .differences import Change, Differences

SHOWN = 12  # lines of a table; --all and --json have every one


def print_differences(found: Differences, every: bool) -> None:
    """On stdout. `every`: all lines of every table."""
    print(visible(f"A: {found.a}"))
    print(visible(f"B: {found.b}"))
    if found.none:
        print("no difference")
        return
    most = 10**9 if every else SHOWN
    _table("totals", ["what", "A", "B", "change"], [_row(change)[1:] for change in found.totals], 10**9)
    _table("predicted codecs", ["codec", "what", "A", "B", "change"], [_row(change) for change in found.codecs], most)
    _print_plans(found, most)
    _table("numbers", ["group", "what", "A", "B", "change"], [_row(change) for change in found.groups], most)
    for side, names in (("A", found.only_a), ("B", found.only_b)):
        _table(f"only in {side}", ["group"], [[name] for name in names], most)


def _print_plans(found: Differences, most: int) -> None:
    """From which codec to which, then whose."""
    moves = Counter((change.a, change.b) for change in found.plans)
    title = f"plan: {len(found.plans)} of {found.matrices} matrices have another codec"
    _table(title, ["A", "B", "matrices"], [[a, b, str(n)] for (a, b), n in moves.most_common()], most)
    experts: dict[tuple[str, str, str], list[str]] = {}
    for change in found.plans:
        experts.setdefault((change.where, change.a, change.b), []).append(change.what)
    rows = [[name, ", ".join(labels), a, b] for (name, a, b), labels in experts.items()]
    _table("", ["group", "experts", "A", "B"], rows, most)


def _table(title: str, header: list[str], rows: list[list[str]], most: int) -> None:
    if rows:
        print_table(title, header, rows[:most])
    if len(rows) > most:
        print(f"... and {len(rows) - most} more (--all shows every one)")


def _row(change: Change) -> list[str]:
    count = "bytes" in change.what
    return [change.where, change.what, _shown(change.a, count), _shown(change.b, count), _moved(change)]


def _shown(value: Any, count: bool) -> str:
    if type(value) is int and count:
        return human_bytes(value)
    if type(value) is float:
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(item, False)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(_shown(item, False) for item in value) or "none"
    return "-" if value is None else str(value)


def _moved(change: Change) -> str:
    if type(change.a) not in (int, float) or type(change.b) not in (int, float):
        return ""
    return f"{(change.b - change.a) / abs(change.a):+.2%}" if change.a else "from 0"
