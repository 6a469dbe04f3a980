"""What strangers wrote is shown as text: no markup, no cursor moved, no line broken, and XML that can be parsed."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from ders_cli.junit import write_junit
from ders_cli.report import print_table, visible

EVIL = "\x1b[31m\x1b]0;title\x07 a\nb\r\t\0 \x9b2J \u202e \u2028 \ud800 \x7f é 専"
SEEN = r"\x1b[31m\x1b]0;title\x07 a\nb\r\t\x00 \x9b2J \u202e \u2028 \ud800 \x7f é 専"


def test_what_cannot_be_seen_is_escaped() -> None:
    assert visible(EVIL) == SEEN
    assert visible("model.layers.0.w é 専 \\n") == "model.layers.0.w é 専 \\n"


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture) -> None:
    """rich would take [red] for a colour, and a [/closing] of nothing for an error."""
    name = "[red]x[/red] [/nothing] [link=http://x]y"
    print_table(name, [name, "n"], [[name, EVIL]])
    shown = capsys.readouterr().out
    assert shown.count(name) == 3 and SEEN in shown
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_junit_of_anything_is_xml(tmp_path: Path) -> None:
    write_junit(tmp_path / "x.xml", {EVIL: "", f"{EVIL} 2": EVIL, "<&\"'>": "]]>"}, EVIL)
    suite = ElementTree.parse(tmp_path / "x.xml").getroot()
    assert [case.get("name") for case in suite] == [SEEN, f"{SEEN} 2", "<&\"'>", "checkpoint"]
    assert [found.get("message") for case in suite for found in case] == [SEEN, "]]>", SEEN]
