"""The router of an upcycled layer at its start: one row of weights per expert.

normal   seeded normal, of the config's initializer_range: what training from scratch would start with
zero     all experts equally likely; which ones are taken is then up to the order of equals
FILE     fitted in closed form to the hidden states of given prompts (router_fit.py)
"""

import math
from typing import Any

import numpy as np
from ders_kernels.counter_rng import draw, make_key

from .errors import CheckpointError

INITIAL_STD = 0.02  # transformers' initializer_range where a config has none


def start_router(kind: str, config: dict[str, Any], seed: int, name: str, experts: int, hidden: int) -> np.ndarray:
    """fp32 [experts, hidden] of the tensor `name`: `zero`, or `normal` by Box and Muller from the counter generator."""
    if kind == "zero":
        return np.zeros((experts, hidden), np.float32)
    std = config.get("initializer_range", INITIAL_STD)
    if type(std) not in (int, float) or not 0 <= std < 1e6:
        raise CheckpointError(f"config.json: initializer_range: expected a number of 0 or more, found {std!r:.40}")
    return normal(make_key(seed, name, "router"), 0, experts * hidden).reshape(experts, hidden) * np.float32(std)


def normal(key: int, first: int, count: int) -> np.ndarray:
    """fp32 [count]: standard normal numbers first ... first + count - 1 under a key; number i takes draws 2i and 2i + 1."""
    uniform = (draw(key, 2 * first, 2 * count).astype(np.float64) + 0.5) * 2.0**-32  # in (0, 1)
    radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * math.pi * uniform[1::2]
    return (radius * np.cos(angle)).astype(np.float32)
