"""What differs between two reports: verdict, totals, codecs, plans, and the groups whose numbers moved most.

Two analyses, two conversions, or one of each: then what was predicted stands beside what came out, as far as both say it.
Groups are matched by name, experts by label.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

Report = dict[str, Any]
Group = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One value that is not the same in A and B; `where` it stands, `what` it is."""

    where: str
    what: str
    a: Any
    b: Any

    @property
    def size(self) -> float:
        """Of numbers, |b - a| relative to the larger; infinite where one of them is missing or is no number."""
        if not (_is_number(self.a) and _is_number(self.b)):
            return math.inf
        return abs(self.b - self.a) / max(abs(self.a), abs(self.b))


@dataclass(frozen=True)
class Differences:
    a: str
    b: str
    totals: list[Change]
    codecs: list[Change]  # what is predicted of each codec
    plans: list[Change]  # what: an expert's label
    groups: list[Change]  # those that moved most first
    only_a: list[str]  # groups that the other has not
    only_b: list[str]
    matrices: int  # in both

    @property
    def none(self) -> bool:
        return not (self.totals or self.codecs or self.plans or self.groups or self.only_a or self.only_b)

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {"schema": 1, "command": "diff", "equal": self.none} | asdict(self)


def differences(a: Report, b: Report) -> Differences:
    """Everything that two checked reports (docs/report-schema.json) say differently."""
    groups_a, groups_b = ({group["name"]: group for group in report["groups"]} for report in (a, b))
    both = [(groups_a[name], groups_b[name]) for name in groups_a if name in groups_b]
    plans = [change for pair in both for change in _plan_changes(*pair)]
    moved = [change for pair in both for change in _changes(pair[0]["name"], _numbers(pair[0]), _numbers(pair[1]))]
    return Differences(
        a["model"],
        b["model"],
        list(_changes("", _totals(a), _totals(b))),
        [change for term in _terms(a, b) for change in _changes(term, _codec(a, term), _codec(b, term))],
        plans,
        sorted(moved, key=lambda change: -change.size),
        [name for name in groups_a if name not in groups_b],
        [name for name in groups_b if name not in groups_a],
        sum(len(set(one["experts"]) & set(other["experts"])) for one, other in both),
    )


def _changes(where: str, a: dict[str, Any], b: dict[str, Any]) -> Iterator[Change]:
    """Of what both have."""
    for what in a:
        if what in b and a[what] != b[what]:
            yield Change(where, what, a[what], b[what])


def _totals(report: Report) -> dict[str, Any]:
    shared = {
        "kind": report["kind"],
        "tool": report["tool"],
        "architecture": report["architecture"],
        "dtype": report["dtype"],
        "base": report["base"],
        "groups": len(report["groups"]),
        "bytes of experts before": report["bytes"]["experts"],
    }
    if report["kind"] == "conversion":
        size = {f"bytes of {name}": report["bytes"][name] for name in ("base", "delta", "weights")}
        return (
            shared
            | size
            | {"bits per delta weight": report["bytes"]["bits_per_delta_weight"]}
            | {f"recipe: {key}": value for key, value in report["recipe"].items()}
        )
    noise = report["verdict"]["noise"] or {"std": None, "of_weights": None}
    return shared | {
        "verdict": report["verdict"]["kind"],
        "noise of weights": noise["of_weights"],
        "recommended recipe": report["recommended"]["recipe"],
        "bytes of source": report["bytes"]["source"],
        "inputs": "{kind}, {tokens} tokens, seed {seed}".format(**report["states"]),
        "neurons in another order": bool(report["alignment"] and report["alignment"]["permuted"]),
    }


def _terms(a: Report, b: Report) -> list[str]:
    return list(dict.fromkeys([*a.get("codecs", {}), *b.get("codecs", {})])) if a["kind"] == b["kind"] else []


def _codec(report: Report, term: str) -> dict[str, Any]:
    found = report["codecs"].get(term)
    names = ("folder_bytes", "bits_per_delta_weight", "output_error", "worst_output_error")
    return {name.replace("_", " "): found[name] if found else None for name in names}


def _plan_changes(a: Group, b: Group) -> Iterator[Change]:
    other = dict(zip(b["experts"], b["plan"], strict=True))
    for label, term in zip(a["experts"], a["plan"], strict=True):
        if label in other and other[label] != term:
            yield Change(a["name"], label, term, other[label])


def _numbers(group: Group) -> dict[str, float | None]:
    """What a group says in numbers. What was predicted has the name of what was noted."""
    if "error" in group:
        error = group["error"]
        return {
            "experts": len(group["experts"]),
            "delta bytes": group["bytes"],
            "weight error": _rms(error["weight"]),
            "delta error": _rms(error["delta"]),
            "kept": _mean(error["kept"]),
            "largest error": max((value for value in error["max_abs"] if value is not None), default=None),
        }
    found = {
        "experts": len(group["experts"]),
        "mean cosine": group["cosine"]["mean"],
        "least cosine": group["cosine"]["least"],
    }
    found |= {f"delta's {name}".replace("_", " "): _mean(values) for name, values in group["delta"].items()}
    return found | _predicted(group)


def _predicted(group: Group) -> dict[str, float | None]:
    """For the codec of the plan, where it is one for all experts."""
    terms = set(group["plan"])
    codec = group["codecs"].get(next(iter(terms))) if len(terms) == 1 else None
    if codec is None:
        return {}
    return {
        "delta bytes": codec["bytes"],
        "weight error": codec["weight_error"],
        "delta error": codec["delta_error"],
        "kept": codec["kept"],
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _rms(values: list[float | None]) -> float | None:
    square = _mean([None if value is None else value * value for value in values])
    return None if square is None else math.sqrt(square)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
