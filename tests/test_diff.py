"""`ders diff`: what differs is listed, what does not is not, and nothing is judged."""

import copy
import json
import math
from pathlib import Path

import pytest
import toy
from command import ders, done
from report_documents import EVIL, analysis, conversion

from ders_cli.reports.differences import Change, differences

ANALYSIS, CONVERSION = analysis(3, 4), conversion(3, 4)


@pytest.mark.parametrize("report", [ANALYSIS, CONVERSION])
def test_a_report_and_itself_do_not_differ(report: dict) -> None:
    found = differences(report, copy.deepcopy(report))
    assert found.none and found.document()["equal"] and found.matrices == 36
    assert differences(report, report | {"model": "elsewhere"}).none  # a copy is the same


def _set(report: dict, path: str, value) -> dict:
    """The report with another value at "groups.0.bytes"."""
    report = copy.deepcopy(report)
    *parents, last = path.split(".")
    at = report
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    at[int(last) if isinstance(at, list) else last] = value
    return report


TOTALS = [
    (ANALYSIS, "verdict.kind", "native", "verdict"),
    (ANALYSIS, "verdict.noise.of_weights", 0.02, "noise of weights"),
    (ANALYSIS, "recommended.recipe", {"delta": "int8"}, "recommended recipe"),
    (ANALYSIS, "bytes.source", 8, "bytes of source"),
    (ANALYSIS, "alignment.permuted", False, "neurons in another order"),
    (ANALYSIS, "states.seed", 5, "inputs"),
    (CONVERSION, "bytes.delta", 8, "bytes of delta"),
    (CONVERSION, "bytes.bits_per_delta_weight", None, "bits per delta weight"),
    (CONVERSION, "recipe.delta", "int8", "recipe: delta"),
    (CONVERSION, "tool", "ders-cli 9", "tool"),
    (CONVERSION, "dtype", "F32", "dtype"),
    (CONVERSION, "architecture", "olmoe", "architecture"),
]


@pytest.mark.parametrize(("report", "path", "value", "what"), TOTALS)
def test_each_total_is_seen_alone(report: dict, path: str, value, what: str) -> None:
    found = differences(report, _set(report, path, value))
    assert [change.what for change in found.totals] == [what]
    assert what == "inputs" or found.totals[0].b == value
    assert not (found.plans or found.groups or found.codecs or found.only_a or found.only_b)


GROUPS = [
    (ANALYSIS, "groups.4.delta.outlier.1", 90.0, "delta's outlier"),
    (ANALYSIS, "groups.4.cosine.mean", 0.5, "mean cosine"),
    (CONVERSION, "groups.4.bytes", 7, "delta bytes"),
    (CONVERSION, "groups.4.error.weight.2", 0.5, "weight error"),
    (CONVERSION, "groups.4.error.max_abs.2", 0.5, "largest error"),
    (CONVERSION, "groups.4.error.kept", [None] * 4, "kept"),
]


@pytest.mark.parametrize(("report", "path", "value", "what"), GROUPS)
def test_each_number_of_a_group_is_seen_alone(report: dict, path: str, value, what: str) -> None:
    found = differences(report, _set(report, path, value))
    assert [(change.where, change.what) for change in found.groups] == [(report["groups"][4]["name"], what)]
    assert not (found.plans or found.totals or found.codecs)


def test_codecs_and_plans_of_matrices() -> None:
    report = _set(CONVERSION, "groups.4.plan", ["exact", *CONVERSION["groups"][4]["plan"][1:]])
    found = differences(CONVERSION, report)
    assert found.plans == [Change(report["groups"][4]["name"], "0", CONVERSION["groups"][4]["plan"][0], "exact")]
    found = differences(ANALYSIS, _set(ANALYSIS, "codecs.int4.folder_bytes", 5))
    assert [(change.where, change.what, change.b) for change in found.codecs] == [("int4", "folder bytes", 5)]


def test_experts_are_matched_by_label_and_groups_by_name() -> None:
    whole = _set(CONVERSION, "groups.0.plan", ["int2", "int2", "int4", "int8"])
    report = copy.deepcopy(whole)
    group = report["groups"].pop(4)
    turned = report["groups"][0]
    for values in (turned["experts"], turned["plan"], *turned["error"].values()):
        values.reverse()
    found = differences(whole, report)
    assert found.only_a == [group["name"]] and found.only_b == [] and not found.plans
    assert differences(report, whole).only_b == [group["name"]]
    # sums of four numbers in another order
    assert all(change.size < 1e-12 for change in found.groups)


def test_what_moved_most_comes_first() -> None:
    report = _set(_set(CONVERSION, "groups.1.bytes", 73_000), "groups.2.bytes", 1)
    assert [change.what for change in differences(CONVERSION, report).groups] == ["delta bytes"] * 2
    assert [change.b for change in differences(CONVERSION, report).groups] == [1, 73_000]
    assert Change("", "", 1, None).size == math.inf and Change("", "", -1.0, 1.0).size == 2


def test_errors_of_a_group_are_root_mean_squares() -> None:
    report = _set(CONVERSION, "groups.4.error.weight", [0.3, None, 0.4, None])
    found = {change.what: change.b for change in differences(CONVERSION, report).groups}
    assert math.isclose(found["weight error"], math.sqrt((0.09 + 0.16) / 2))


def test_a_prediction_beside_its_conversion() -> None:
    """Groups of one plan: what was predicted of it stands beside what was noted."""
    predicted, noted = analysis(2, 4), conversion(2, 4)
    for one, other in zip(predicted["groups"], noted["groups"], strict=True):
        one["plan"] = other["plan"] = ["int4"] * 4
        one["experts"] = other["experts"]
    predicted["groups"][0]["codecs"]["int4"] |= {"bytes": 11, "weight_error": 0.25}
    found = differences(predicted, noted)
    first = {change.what: change.a for change in found.groups if change.where == noted["groups"][0]["name"]}
    assert first["delta bytes"] == 11 and first["weight error"] == 0.25 and "mean cosine" not in first
    assert [change.what for change in found.totals] == ["kind"]


def test_the_command_tells_it_all(tmp_path: Path) -> None:
    """Real conversions of one model; exit code 0 whatever differs."""
    toy.make("mixtral", tmp_path / "plain")
    for delta in ("int4", "int8"):
        done("compress", tmp_path / "plain", "--delta", delta, "-o", tmp_path / delta, "-q")
    same = done("diff", tmp_path / "int4", tmp_path / "int4")
    assert same.out.splitlines()[-1] == "no difference"
    ran = done("diff", tmp_path / "int4", tmp_path / "int8", "--json").json
    assert not ran["equal"] and len(ran["plans"]) == ran["matrices"] == 18
    assert {change["what"] for change in ran["totals"]} == {
        "bytes of delta",
        "bytes of weights",
        "bits per delta weight",
        "recipe: delta",
    }
    sizes = {
        path.name: json.loads((path / "ders.json").read_text())["bytes"]["delta"] for path in tmp_path.glob("int*")
    }
    assert [(c["a"], c["b"]) for c in ran["totals"] if c["what"] == "bytes of delta"] == [
        (sizes["int4"], sizes["int8"])
    ]
    short, long = (done("diff", tmp_path / "int4", tmp_path / "int8", *every).out for every in ((), ("--all",)))
    assert "more (--all shows every one)" in short and "more (" not in long and len(long) > len(short)
    assert "18 of 18 matrices" in short.replace("\n", " ")


def test_strangers_names_are_shown_as_text(tmp_path: Path) -> None:
    for name, report in (("a", conversion(2, 3, name=EVIL)), ("b", conversion(1, 3, name=EVIL, seed=1))):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    ran = done("diff", tmp_path / "a.json", tmp_path / "b.json")
    assert "\u202e" not in ran.out and "\\u202e" in ran.out and "only in A" in ran.out


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(CONVERSION))
    ran = ders("diff", tmp_path / "x.json", tmp_path / "none")
    assert ran.code == 2 and ran.err.count("\n") == 1 and str(tmp_path / "none") in ran.err
