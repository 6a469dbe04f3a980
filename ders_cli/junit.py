"""A verify report as JUnit XML: a test case per check, a failure per finding."""

from pathlib import Path
from xml.etree import ElementTree

from .report import visible


def write_junit(path: Path, checks: dict[str, str], error: str = "") -> None:
    """XML has no form for control characters: they stand there escaped. `checks`: where -> problem or "". `error`: the whole run could not be made, and why."""
    cases = len(checks) + bool(error)
    failures = sum(1 for problem in checks.values() if problem)
    suite = ElementTree.Element(
        "testsuite", name="ders verify", tests=str(cases), failures=str(failures), errors=str(int(bool(error)))
    )
    for where, problem in checks.items():
        case = ElementTree.SubElement(suite, "testcase", classname="ders.verify", name=visible(where))
        if problem:
            ElementTree.SubElement(case, "failure", message=visible(problem))
    if error:
        case = ElementTree.SubElement(suite, "testcase", classname="ders.verify", name="checkpoint")
        ElementTree.SubElement(case, "error", message=visible(error))
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
