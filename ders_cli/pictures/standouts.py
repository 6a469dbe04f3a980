"""Groups whose numbers are far from their like elsewhere: where to look first.

Far is measured by medians, which a few odd layers do not move: z = |value - median| / (1.4826 MAD), MAD being the median of
|value - median| and 1.4826 MAD the standard deviation of a Gaussian (Rousseeuw and Croux, JASA 88, 1993).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .quantities import QUANTITIES, Group

FEWEST = 6  # groups of a projection below which there is no telling who is odd
Z = 6.0  # deviations from which on a group is odd
LEAST = 0.05  # of the median, a deviation at least: where all are alike, a little is nothing
LOST = float("inf")


@dataclass(frozen=True)
class StandOut:
    """One thing to look at."""

    name: str  # of the group
    quantity: str
    value: float  # mean over the experts
    usual: float  # median over the groups that are compared
    z: float  # infinite: some statistics are null


def standouts(document: dict[str, Any], most: int = 20) -> list[StandOut]:
    """The oddest first."""
    found = [_lost(group) for group in document["groups"] if _nulls(document, group)]
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in document["groups"]:
        alike.setdefault(_kind(document, group), []).append(group)
    for groups in alike.values():
        for quantity in QUANTITIES[document["kind"]]:
            found += _far(groups, quantity.name, np.array([_mean(quantity.values(group)) for group in groups]))
    return sorted(found, key=lambda one: -one.z)[:most]


def _kind(document: dict[str, Any], group: Group) -> tuple[str, ...]:
    """Groups that may be compared: of one projection, and in a conversion of the same codecs."""
    codecs = sorted(set(group["plan"])) if document["kind"] == "conversion" else []
    return (group["projection"], *codecs)


def _far(groups: list[Group], quantity: str, means: np.ndarray) -> list[StandOut]:
    known = means[np.isfinite(means)]
    if len(known) < FEWEST:
        return []
    usual = float(np.median(known))
    deviation = max(1.4826 * float(np.median(np.abs(known - usual))), LEAST * abs(usual), 1e-300)
    z = np.abs(means - usual) / deviation
    odd = np.flatnonzero(z > Z)
    return [StandOut(groups[i]["name"], quantity, float(means[i]), usual, float(z[i])) for i in odd]


def _nulls(document: dict[str, Any], group: Group) -> bool:
    return bool(np.isnan(QUANTITIES[document["kind"]][0].values(group)).any())


def _lost(group: Group) -> StandOut:
    return StandOut(group["name"], "not defined: zeros, NaN or infinity in an expert", LOST, LOST, LOST)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
