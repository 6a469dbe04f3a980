"""A report in a terminal: an analysis or a conversion as a few small tables with bars."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml

from ..pictures.quantities import PROJECTIONS, QUANTITIES, terms_by_size
from ..pictures.standouts import standouts
from ..report import bar, finite, human_bytes, print_table, visible

SHOWN = 8  # groups that stand out; --json and --html have more


def print_document(document: dict[str, Any]) -> None:
    """A report (docs/report-schema.json) on stdout."""
    document = finite(document)
    print(visible(f"{document['model']}: {document['kind']}, {document['architecture']}, {document['dtype']}"))
    if document["kind"] == "analysis":
        _print_verdict(document)
        _print_quantities(document)
        _print_codecs(document)
    else:
        _print_sizes(document)
        _print_plan(document)
        _print_quantities(document)
    _print_standouts(document)
    if document["kind"] == "analysis":
        _print_recommended(document)


def _print_verdict(document: dict[str, Any]) -> None:
    verdict = document["verdict"]
    print(visible(f"{verdict['kind']}: {verdict['says']}"))
    for reason in verdict["reasons"]:
        print(visible(f"  - {reason}"))


def _print_quantities(document: dict[str, Any]) -> None:
    """Mean over all experts, with the range of them, by projection."""
    here = [p for p in PROJECTIONS if any(group["projection"] == p for group in document["groups"])]
    rows = []
    for quantity in QUANTITIES[document["kind"]]:
        cells = [_range(quantity.of(group) for group in document["groups"] if group["projection"] == p) for p in here]
        rows.append([quantity.name, *cells])
    print_table("experts: mean (least to most)", ["", *here], rows)


def _range(lists: Iterable[list[float | None]]) -> str:
    known = [value for values in lists for value in values if value is not None]
    return f"{sum(known) / len(known):.4g} ({min(known):.3g} to {max(known):.3g})" if known else "-"


def _print_codecs(document: dict[str, Any]) -> None:
    source = max(1, document["bytes"]["source"])
    rows = [["as it is", "", human_bytes(source), bar(1.0), "0", ""]]
    for term, codec in document["codecs"].items():
        size = codec["folder_bytes"]
        rows.append(
            [
                term,
                _number(codec["bits_per_delta_weight"]),
                "-" if size is None else human_bytes(size),
                bar(float("nan") if size is None else size / source),
                _number(codec["output_error"]),
                _number(codec["worst_output_error"]),
            ]
        )
    print_table("predicted", ["codec", "bits/weight", "folder", "of the source", "output error", "worst"], rows)


def _print_sizes(document: dict[str, Any]) -> None:
    size = document["bytes"]
    before = max(1, size["experts"])
    parts = {"experts before": size["experts"], "base": size["base"], "deltas": size["delta"]}
    print_table("", ["", "bytes", ""], [[name, human_bytes(n), bar(n / before)] for name, n in parts.items()])


def _print_plan(document: dict[str, Any]) -> None:
    counts = Counter(term for group in document["groups"] for term in group["plan"])
    rows = [[t, str(counts[t]), bar(counts[t] / counts.total())] for t in terms_by_size(document)]
    print_table("plan", ["codec", "matrices", "share"], rows)


def _print_standouts(document: dict[str, Any]) -> None:
    found = standouts(document, SHOWN)
    if found:
        rows = [[one.name, one.quantity, _number(one.value), _number(one.usual)] for one in found]
        print_table("what stands out", ["group", "what", "mean here", "median"], rows)


def _print_recommended(document: dict[str, Any]) -> None:
    advice = document["recommended"]
    print(visible(f"recommended: {advice['says']}"))
    for line in yaml.safe_dump(advice["recipe"], sort_keys=False).splitlines() if advice["recipe"] else []:
        print(visible(f"  {line}"))


def _number(value: float | None) -> str:
    return "-" if value is None or value in (float("inf"), -float("inf")) else f"{value:.4g}"
