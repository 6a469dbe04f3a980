"""Rows of x as the products of a layer take them: the pairs of token and expert, one expert's after the other's.

x        [pairs, in]
experts  the experts' numbers
counts   how many pairs each of them has
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np


def of_pairs(experts: Sequence[int], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [n] and [n + 1]: the experts' numbers, and where the pairs of each begin."""
    return np.array(experts, np.int64), np.array([0, *accumulate(counts)], np.int64)
