"""MC#'s programme: a published layer, and every plan there is."""

import itertools

import numpy as np
import pytest

from ders_cli.budget.pmq import allocate_bits, importance

# Layer 0 of the inputs that MC-MoE publishes beside its precision_solver.py (Mixtral 8x7B), rounded, and the plans it ships.
PHI = [68862, 63387, 62746, 63751, 66314, 70431, 56466, 72331]
GATES = [19891.639, 22812.152, 21595.748, 21344.5, 19123.953, 16804.887, 17566.242, 18464.881]
ERRORS = [
    [455, 180.4, 78.21],
    [3856.11, 708.03, 369.99],
    [735.98, 372.66, 156.33],
    [663.2, 341.52, 143.51],
    [525.43, 273.92, 114.71],
    [434.18, 218.07, 92.07],
    [3275.43, 677.75, 288.98],
    [450.27, 231.79, 97.39],
]
PLANS = {
    12: ([1, 3, 2, 1, 1, 1, 2, 1], 21.4715),
    16: ([2, 3, 2, 2, 2, 1, 3, 1], 15.0021),
    20: ([2, 3, 3, 3, 2, 2, 3, 2], 10.2694),
}


def _bits(options: tuple[int, ...]) -> list[int]:
    return [k + 1 for k in options]


@pytest.mark.parametrize("total", PLANS)
def test_the_published_plans(total: int) -> None:
    found = allocate_bits(importance(PHI, GATES), np.array(ERRORS), total)
    plan, objective = PLANS[total]
    assert _bits(found.options) == plan and found.bytes <= total and found.exact
    assert found.cost == pytest.approx(objective, abs=5e-5)  # four digits are published


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rule", [True, False])
def test_every_plan_there_is(seed: int, rule: bool) -> None:
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 6))
    weights = importance(rng.integers(1, 100, experts), rng.gamma(2, size=experts))
    errors = np.sort(rng.gamma(2, size=(experts, 3)))[:, ::-1]
    for total in range(experts + 3, 3 * experts + 1):
        plans = [p for p in itertools.product((1, 2, 3), repeat=experts) if sum(p) <= total]
        plans = [p for p in plans if not rule or {2, 3} <= set(p)]
        best = min(sum(weights[j] * errors[j, b - 1] for j, b in enumerate(p)) for p in plans)
        found = allocate_bits(weights, errors, total, rule)
        assert found.cost == pytest.approx(best) and tuple(_bits(found.options)) in plans


def test_the_rule_changes_plans() -> None:
    """Two experts and 6 bits: without the rule both take 3, with it one takes 2."""
    weights, errors = np.array([1.0, 1.0]), np.array([[9.0, 4.0, 1.0], [8.0, 3.0, 1.0]])
    assert _bits(allocate_bits(weights, errors, 6, rule=False).options) == [3, 3]
    assert _bits(allocate_bits(weights, errors, 6).options) == [3, 2]
    with pytest.raises(ValueError, match="no choice"):
        allocate_bits(weights, errors, 4)


def test_importance_needs_no_unit() -> None:
    expected = (np.array(PHI) / sum(PHI)) * (np.array(GATES) / sum(GATES)) ** 1.5
    assert np.allclose(importance(PHI, GATES), expected)
    assert np.allclose(importance(np.array(PHI) * 7, np.array(GATES) / 3), expected)
    assert not importance([0, 0], [0, 0]).any()  # an expert that was never chosen costs nothing
