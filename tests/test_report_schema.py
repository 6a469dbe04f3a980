"""The published schema is the one that reports are checked by, and real reports are as it says."""

import copy
import json
import os
from pathlib import Path

import pytest
import report_documents
import toy
from command import ROOT, ders, done
from jsonschema import Draft202012Validator

from ders_cli.errors import UsageError
from ders_cli.reports.document import check_report, json_schema, read_report

PUBLISHED = ROOT / "docs" / "report-schema.json"
MADE = {"analysis": report_documents.analysis(2, 3), "conversion": report_documents.conversion(2, 3)}


@pytest.fixture(scope="module")
def published() -> Draft202012Validator:
    schema = json.loads(PUBLISHED.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model, and conversions of it: one codec, exact, several codecs in a group."""
    at = tmp_path_factory.mktemp("folders")
    toy.make("mixtral", at / "plain")
    (at / "mixed.yaml").write_text(
        "delta: int4\nrules:\n  - {layers: 0, projections: [down], experts: [0, 2], delta: int8}\n"
    )
    done("compress", at / "plain", "--delta", "int4", "-o", at / "int4", "-q")
    done("compress", at / "plain", "--delta", "exact", "-o", at / "exact", "-q")
    done("compress", at / "plain", "--recipe", at / "mixed.yaml", "-o", at / "mixed", "-q")
    return at


def test_published_schema_is_the_one_in_use() -> None:
    """To write it anew: python -c "import json; from ders_cli.reports.document import *; print(json.dumps(json_schema(), indent=1))" """
    assert json.loads(PUBLISHED.read_text()) == json_schema()


@pytest.mark.parametrize("kind", MADE)
def test_made_reports_are_valid(kind: str, published: Draft202012Validator) -> None:
    published.validate(MADE[kind])
    check_report("made", MADE[kind])


@pytest.mark.parametrize("name", ["int4", "exact", "mixed"])
def test_conversions_are_valid(name: str, folders: Path, published: Draft202012Validator) -> None:
    document = done("report", folders / name, "--json").json
    published.validate(document)
    manifest = json.loads((folders / name / "ders.json").read_text())
    assert (
        sum(group["bytes"] for group in document["groups"]) == manifest["bytes"]["delta"] == document["bytes"]["delta"]
    )
    noted = [member["error"] for group in manifest["groups"] for member in group["members"]]
    for field in ("weight", "delta", "kept", "max_abs", "cosine"):
        assert [v for group in document["groups"] for v in group["error"][field]] == [error[field] for error in noted]


@pytest.mark.parametrize("name", ["plain", "int4"])
def test_analyses_are_valid(name: str, folders: Path, published: Draft202012Validator, tmp_path: Path) -> None:
    document = done("analyze", folders / name, "--json", "-q").json
    published.validate(document)
    check_report(name, document)
    (tmp_path / "kept.json").write_text(json.dumps(document))
    assert document["verdict"]["says"] in done("report", tmp_path / "kept.json").out.replace("\n", " ")


def test_plan_of_a_mixed_group(folders: Path) -> None:
    document = done("report", folders / "mixed", "--json").json
    plans = {group["name"]: group["plan"] for group in document["groups"]}
    odd = [name for name, plan in plans.items() if plan != ["int4"] * 3]
    assert [plans[name] for name in odd] == [["int8", "int4", "int8"]]
    assert odd[0].startswith("model.layers.0.") and odd[0].endswith("down_proj")


def _broken(kind: str) -> list:
    group = {"analysis": "delta", "conversion": "error"}[kind]

    def missing(d):
        del d["groups"][1]["plan"]

    def unknown(d):
        d["groups"][0]["surprise"] = 1

    def word(d):
        d["bytes"]["experts"] = "many"

    def truth(d):
        d["groups"][0][group][next(iter(d["groups"][0][group]))][0] = True

    def projection(d):
        d["groups"][0]["projection"] = "sideways"

    def negative(d):
        d["bytes"]["experts"] = -1

    def no_expert(d):
        d["groups"][0]["experts"] = []

    return [missing, unknown, word, truth, projection, negative, no_expert]


@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("kind", MADE)
def test_both_refuse_the_same(kind: str, number: int, published: Draft202012Validator) -> None:
    document = copy.deepcopy(MADE[kind])
    _broken(kind)[number](document)
    assert not published.is_valid(document)
    with pytest.raises(UsageError) as error:
        check_report("x.json", document)
    assert "\n" not in str(error.value) and str(error.value).startswith("x.json: ")


@pytest.mark.parametrize("field", ["plan", "pairs", "list", "energy"])
def test_lists_must_fit_the_experts(field: str) -> None:
    """What JSON Schema cannot say; figures and differences rely on it."""
    document = copy.deepcopy(MADE["analysis"])
    group = document["groups"][2]
    lists = {
        "plan": group["plan"],
        "pairs": group["cosine"]["pairs"][1],
        "list": group["delta"]["std"],
        "energy": group["rank_energy"]["energy"],
    }
    lists[field].pop()
    with pytest.raises(UsageError, match="expected"):
        check_report("x.json", document)


HOSTILE = {
    "empty": b"",
    "no-json": b"{",
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "deep-object": b'{"a": ' * 60 + b"1" + b"}" * 60,
    "deep-recipe": json.dumps(MADE["conversion"] | {"recipe": json.loads('{"a": ' * 60 + "1" + "}" * 60)}).encode(),
    "nan": json.dumps(MADE["conversion"]).replace("0.9999", "NaN", 1).encode(),
    "huge": json.dumps(MADE["conversion"]).replace("0.9999", "1e999", 1).encode(),
    "twice": b'{"schema": 1, "schema": 1, "kind": "analysis"}',
    "other": b'{"schema": 1, "command": "verify"}',
    "other-line": b'{"schema": 1, "command": "a\\nb\\u001b[31m"}',
    "kind": b'{"schema": 1, "kind": ["analysis"]}',
    "later": b'{"schema": 2, "kind": "analysis"}',
    "latin": "é".encode("latin-1"),
    "bomb": b"[" + b"[]," * 2_000_000 + b"[]]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_other_files_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(HOSTILE[name])
    for command in (["report", path], ["diff", path, path]):
        ran = ders(*command)
        assert ran.code == 2 and not ran.out, ran
        assert ran.err.count("\n") == 1 and len(ran.err) < 500 and "x.json" in ran.err, ran.err


def test_a_later_report_is_told_by_its_schema() -> None:
    with pytest.raises(UsageError, match="schema 2; this ders reads reports of schema 1"):
        check_report("x.json", MADE["analysis"] | {"schema": 2, "news": 1})


def test_what_is_no_report_is_refused(tmp_path: Path, folders: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place, words in (
        (tmp_path / "none", "missing"),
        (tmp_path / "pipe", "FIFO"),
        (folders / "plain", "ders analyze"),
    ):
        ran = ders("report", place)
        assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1, ran


def test_a_kept_report_is_the_report(tmp_path: Path, folders: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(done("report", folders / "mixed", "--json").out)
    assert done("report", kept, "--json").json == json.loads(kept.read_text()) == read_report(kept)
    assert done("report", kept).out == done("report", folders / "mixed").out
