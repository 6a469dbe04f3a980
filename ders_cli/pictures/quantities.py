"""What a report says of every expert, as a figure or a table shows it: a name, a meaning, and where it stands in a group."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Group = dict[str, Any]
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class Quantity:
    """One number an expert's matrix."""

    name: str
    says: str
    of: Callable[[Group], list[float | None]]  # a group -> one for each of its experts

    def values(self, group: Group) -> np.ndarray:
        """fp64 [E]; NaN where the report has null."""
        return np.array(self.of(group), dtype=np.float64)


def _under(part: str, field: str) -> Callable[[Group], list[float | None]]:
    return lambda group: group[part][field]


def _away(group: Group) -> list[float | None]:
    """1 - cosine: cosines to a good base differ after many nines."""
    return [None if cosine is None else 1 - cosine for cosine in group["delta"]["cosine_to_base"]]


def _bits(group: Group) -> list[float | None]:
    out, width = group["shape"]
    return [8 * group["bytes"] / (out * width * len(group["experts"]))] * len(group["experts"])


OF_ANALYSIS = (
    Quantity("|D| / |W|", "size of an expert's delta relative to its weights", _under("delta", "relative_norm")),
    Quantity("1 - cosine to base", "of an expert's weights and the base's", _away),
    Quantity("equal bits", "share of weights that are the base's, bit for bit", _under("delta", "equal")),
    Quantity("entropy", "bits per weight that an exact delta takes at least", _under("delta", "entropy")),
    Quantity(
        "kurtosis", "of the delta's entries; 3 for a Gaussian, more with heavy tails", _under("delta", "kurtosis")
    ),
    Quantity("outlier", "largest weight of a column over the column's mean magnitude", _under("delta", "outlier")),
    Quantity("std of D", "standard deviation of the delta's entries", _under("delta", "std")),
)
OF_CONVERSION = (
    Quantity("|W' - W| / |W|", "error that was noted, relative to the weights", _under("error", "weight")),
    Quantity("|W' - W| / |D|", "the same, relative to the delta", _under("error", "delta")),
    Quantity("kept", "<D', D> / |D|^2, how much of the delta's size is left; 1: all", _under("error", "kept")),
    Quantity("largest |W' - W|", "largest error of a weight", _under("error", "max_abs")),
    Quantity("bits per weight", "bytes of a group's deltas * 8 / weights of its experts", _bits),
)
# The cosine that ders.json notes is 1 to six digits wherever a codec is any good, and |W' - W| / |W| says the same better.
QUANTITIES = {"analysis": OF_ANALYSIS, "conversion": OF_CONVERSION}


def terms_by_size(document: dict[str, Any]) -> list[str]:
    """Codecs that some expert gets by the plan, the smallest in bytes first."""
    bits: dict[str, list[float]] = {}
    for group in document["groups"]:
        for term in dict.fromkeys(group["plan"]):
            bits.setdefault(term, []).append(_plan_bits(group, term))
    return sorted(bits, key=lambda term: (sum(bits[term]) / len(bits[term]), term))


def _plan_bits(group: Group, term: str) -> float:
    if "bytes" in group:  # a conversion: of a group with several codecs, what they take together
        return _bits(group)[0]
    found = group["codecs"].get(term)
    return _bits(group | {"bytes": found["bytes"]})[0] if found and found["bytes"] is not None else 0.0
