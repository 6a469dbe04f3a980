"""A plan as rules: whatever the plan, the recipe's file says the same of every matrix."""

import numpy as np
import pytest
import yaml

from ders_cli.budget.rules import MOST_RANGES, compact
from ders_cli.budget.spent import with_plan
from ders_cli.layouts import ExpertGroup, MatrixView
from ders_cli.recipe import MAX_RECIPE_BYTES, Recipe, load_recipe, make_recipe

TERMS = ["int4", "int1", "ternary0.01", "drop0.9+int4", "exact", "none"]


def _groups(
    layers: range, labels: list[str], projections: tuple[str, ...] = ("gate", "up", "down")
) -> list[ExpertGroup]:
    members = tuple((label, MatrixView(f"x.{label}", (2, 2), 0, 2, 1)) for label in labels)
    return [
        ExpertGroup(f"model.layers.{n}.mlp.experts.{p}_proj", n, p, "BF16", members)
        for n in layers
        for p in projections
    ]


def _cells(groups: list[ExpertGroup]) -> list[tuple[int, str, str]]:
    return [(group.layer, group.projection, label) for group in groups for label, _ in group.members]


def _read_back(plan: dict, groups: list[ExpertGroup], tmp_path) -> Recipe:
    """The plan's recipe, by way of a YAML file; every matrix has the codec of the plan."""
    recipe = with_plan(make_recipe({"delta": "int8", "seed": 7}), plan)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    loaded = load_recipe(str(path), {})
    assert loaded == recipe and loaded.seed == 7
    loaded.check_experts(groups)
    for group in groups:
        terms = [codec.term for codec in loaded.codecs(group)]
        assert terms == [plan[group.layer, group.projection, label] for label, _ in group.members]
    return loaded


@pytest.mark.parametrize("seed", range(8))
def test_any_plan_reads_back(seed: int, tmp_path) -> None:
    rng = np.random.default_rng(seed)
    labels = [str(n) for n in range(int(rng.integers(1, 12)))] + ["shared"] * bool(seed % 2)
    groups = _groups(
        range(int(rng.integers(1, 9))), labels, ("up", "down") if seed % 3 == 0 else ("gate", "up", "down")
    )
    plan = {cell: TERMS[int(rng.integers(len(TERMS)) * rng.integers(0, 2))] for cell in _cells(groups)}
    _read_back(plan, groups, tmp_path)


def test_what_is_regular_takes_few_rules(tmp_path) -> None:
    groups = _groups(range(6), ["0", "1", "2", "3", "shared"])
    assert _read_back(dict.fromkeys(_cells(groups), "int4"), groups, tmp_path).rules == ()
    plan = {c: "int8" if c[0] in (0, 1, 5) and c[1] == "down" else "int4" for c in _cells(groups)}
    (rule,) = _read_back(plan, groups, tmp_path).rules
    assert (rule.layers, rule.projections, rule.experts, rule.delta) == ("0-1,5", ("down",), None, "int8")
    plan = {
        c: "exact" if c[2] in ("0", "1", "2", "shared") else "int4" for c in _cells(groups)
    }  # exact is the commoner
    (rule,) = _read_back(plan, groups, tmp_path).rules
    assert (rule.layers, rule.experts, rule.delta) == ("0-5", ("3",), "int4")


def test_the_joining_that_takes_fewer_rules() -> None:
    """Two experts, each with an own pattern over layers, 6 terms of layers apart: by layer 6 rules, by expert 2."""
    cells = [(layer, "up", label) for layer in range(12) for label in "0123456789"]
    patterns = {"3": {0, 2, 4, 6, 8}, "7": {0, 3, 6, 9}}
    plan = {(n, p, e): "int8" if n in patterns.get(e, ()) else "int4" for n, p, e in cells}
    default, rules = compact(plan)
    assert default == "int4" and sorted(rule["layers"] for rule in rules) == ["0,2,4,6,8", "0,3,6,9"]


def test_layers_with_experts_of_their_own(tmp_path) -> None:
    """A rule names only experts that its layers have."""
    groups = _groups(range(2), ["0", "1", "2", "3"]) + _groups(range(2, 4), ["0", "1"])
    plan = {c: "int4" if c[2] in "01" else "int8" for c in _cells(groups)}
    _read_back(plan, groups, tmp_path)
    groups += _groups(range(4, 20), ["0", "1"])
    plan = {
        c: "int8" if c[0] < 4 and c[2] in "01" else "int4" for c in _cells(groups)
    }  # all of layer 2, half of layer 0
    _read_back(plan, groups, tmp_path)


def test_a_rule_stays_readable(tmp_path) -> None:
    """500 layers apart from each other are several rules, as a recipe's texts have a most length."""
    groups = _groups(range(1000), ["0"], ("up",))
    plan = {c: "int8" if c[0] % 2 or c[0] == 500 else "int4" for c in _cells(groups)}
    rules = _read_back(plan, groups, tmp_path).rules
    assert len(rules) == -(-499 // MOST_RANGES) and all(len(rule.layers) < 1000 for rule in rules)


def test_a_large_model_without_any_order(tmp_path) -> None:
    """60 layers of 256 experts, every matrix on its own: 46,080 cells stay a recipe that ders reads."""
    rng = np.random.default_rng(0)
    layers, labels = range(60), [str(n) for n in range(256)]
    plan = {(n, p, e): TERMS[int(rng.integers(4))] for n in layers for p in ("gate", "up", "down") for e in labels}
    recipe = with_plan(make_recipe({"delta": "int8"}), plan)
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), default_flow_style=None, width=10**6)
    assert len(text) < MAX_RECIPE_BYTES and len(recipe.rules) <= 60 * 3 * 3
    group = _groups(range(31, 32), labels)[1]
    assert [codec.term for codec in recipe.codecs(group)] == [plan[31, "up", e] for e in labels]
