"""MC#'s allocation of bits to the experts of one layer: an exact integer programme of importance times error.

    minimise  sum_j phi_j^a w_j^c eps_{j,b_j}^g     so that   sum_j b_j <= total bits,
              and at least one expert has 3 bits and at least one has 2                 (b in {1, 2, 3})

phi: how often an expert is chosen, w: the sum of its gates; each normalised to sum 1 over the layer. eps: the norm of the error
of the block's output with only this expert coded so. a = 1, c = 1.5; the published plans follow from g = 1.
(MC#, PMQ: the programme of its predecessor MC-MoE, arXiv 2410.06270, as its released solver states it.)

The rule of cardinality is a *mark* of an option (choice.best_within), so the programme is the knapsack's own.
"""

from collections.abc import Sequence

import numpy as np

from .choice import Choice, Item, best_within

BITS = (1, 2, 3)
ALPHA, GAMMA, ERROR_POWER = 1.0, 1.5, 1.0


def importance(counts: Sequence[float], gates: Sequence[float]) -> np.ndarray:
    """float64 [E]: phi^a w^c of every expert, from how often it is chosen and the sum of its gates, in any unit."""
    phi, w = (
        np.asarray(values, np.float64) / max(np.sum(values), np.finfo(np.float64).tiny) for values in (counts, gates)
    )
    return phi**ALPHA * w**GAMMA


def allocate_bits(weights: np.ndarray, errors: np.ndarray, total: int, rule: bool = True) -> Choice:
    """The plan of one layer: choice.options[j] + 1 are expert j's bits, choice.cost is the objective.

    weights [E] as `importance` gives them, errors [E, 3] for 1, 2 and 3 bits. `rule` False leaves out the two
    cardinality rows. Raises ValueError where no plan of `total` bits keeps the rule.
    """
    costs = weights[:, None] * np.asarray(errors, np.float64) ** ERROR_POWER
    items = [Item(BITS, tuple(map(float, row)), (0, 1, 2)) for row in costs]  # marks: has 2 bits, has 3 bits
    return best_within(items, total, required=3 if rule else 0)
