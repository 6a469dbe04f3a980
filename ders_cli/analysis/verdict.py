"""What experts are to each other, and whether a shared base makes sense.

    r = |W - mean| / |W|   over all experts of a group          s = r / sqrt(1 - 1/E)   1 for independent experts

    copies         all bits are equal
    noisy copies   s < 0.25: copies to which independent normal noise was added (noise.py)
    siblings       s < 0.25: fine-tuned from one ancestor; upcycled models have 0.001 to 0.1
    relatives      s < 0.7: a common ancestor is far away; every lossy form costs much of what they are
    permuted       unrelated as they stand, but their neurons match in another order (ders_cli/alignment.py)
    native         as different as independently trained ones

The model has the kind that most of its weights have; of layers that are copies in a model that is none, it has that of the rest.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from .noise import NoiseFound

SIBLINGS, RELATIVES = 0.25, 0.7
KURTOSIS, SPREAD = (
    0.2,
    1.12,
)  # of noise: |kurtosis - 3| and the rows' and columns' spread are below; means over all experts
LEVELS = 0.1  # the level of noise differs by less from layer to layer, as it is or relative to the weights
MANY = (
    0.5  # share of the experts of which noise.py must know, of a layer's that are permuted, of groups with a stranger
)
STRANGE = 0.3  # below the median of the experts' mean cosines: a stranger

WORDS = {
    "copies": "are copies: all their bits are equal",
    "noisy copies": "are copies with noise",
    "siblings": "are siblings, fine-tuned from one ancestor",
    "relatives": "are relatives: a common ancestor is far away",
    "permuted": "have their neurons in another order",
    "native": "are as different as independent ones",
    None: "hold NaN or infinity, and nothing is known of them",
}


@dataclass(frozen=True)
class GroupFacts:
    """What a verdict looks at, of one group. Energies are sums over its experts; NaN where a number is not finite."""

    name: str
    layer: int
    projection: str
    labels: tuple[str, ...]
    weights: int  # of all experts
    energy: float  # |W|^2
    mean_energy: float  # |W - mean|^2
    cosine: tuple[float, float]  # of two experts: least, mean
    copied: bool  # all experts' bits are equal
    equal: float  # share of weights whose bits are the base's
    to_others: tuple[float, ...] = ()  # each expert's mean cosine to the others
    permuted: tuple[str, ...] = ()  # experts whose neurons stand in another order
    noise: tuple[NoiseFound, ...] = ()

    @property
    def experts(self) -> int:
        return len(self.labels)

    @property
    def std(self) -> float:
        """Root mean square of the weights."""
        return math.sqrt(self.energy / self.weights)


@dataclass(frozen=True)
class Noise:
    """std: of what was added to each copy; of_weights: relative to the weights' root mean square."""

    std: float
    of_weights: float
    kurtosis: float
    spread: float  # the larger of the rows' and the columns'


@dataclass(frozen=True)
class Verdict:
    kind: str
    says: str
    reasons: list[str]
    noise: Noise | None = None
    of_groups: dict[str, str | None] = field(default_factory=dict)  # name -> kind; None: not finite


def judge(groups: Sequence[GroupFacts], base: str) -> Verdict:
    """The verdict on a model; `base`: the label of the base that noise was measured against."""
    if all(group.experts == 1 for group in groups):
        says = "Not worth it: there is one expert in a layer, so there is nothing to share."
        return Verdict("native", says, [], None, dict.fromkeys((g.name for g in groups), "native"))
    noise = _noise([group for group in groups if _kind(group) == "siblings"], base)
    kinds = {group.name: _noisy(_kind(group), noise) for group in groups}
    kind = _main_kind(groups, kinds)
    reasons = [
        *_sizes(groups, kinds, kind),
        *_noise_reasons(noise, kind),
        *_exceptions(groups, kinds, kind),
        *_strangers(groups),
    ]
    return Verdict(
        kind, _sentence(kind, groups, kinds, noise), reasons, noise if kind == "noisy copies" else None, kinds
    )


def scaled_distance(groups: Iterable[GroupFacts]) -> tuple[float, float]:
    """(r, s) of some groups together."""
    groups = list(groups)
    energy = sum(group.energy for group in groups)
    apart = sum(group.mean_energy for group in groups)
    independent = sum(group.energy * (1 - 1 / group.experts) for group in groups)
    if not energy > 0:
        return (math.nan, math.nan) if math.isnan(energy) else (0.0, 0.0)
    return math.sqrt(apart / energy), math.sqrt(apart / independent) if independent > 0 else math.nan


def _kind(group: GroupFacts) -> str | None:
    if group.experts == 1:
        return "native"
    if group.copied:
        return "copies"
    _, s = scaled_distance([group])
    if math.isnan(s):
        return None
    if s >= SIBLINGS and len(group.permuted) >= MANY * (group.experts - 1):
        return "permuted"
    return "siblings" if s < SIBLINGS else "relatives" if s < RELATIVES else "native"


def _noisy(kind: str | None, noise: Noise | None) -> str | None:
    return "noisy copies" if kind == "siblings" and noise is not None else kind


def _main_kind(groups: Sequence[GroupFacts], kinds: dict[str, str | None]) -> str:
    weights: dict[str, int] = {}
    for group in groups:
        kind = kinds[group.name]
        if kind is not None:
            weights[kind] = weights.get(kind, 0) + group.weights
    if len(weights) > 1:
        weights.pop("copies", None)
    return max(weights, key=lambda kind: weights[kind], default="native")


def _noise(groups: Sequence[GroupFacts], base: str) -> Noise | None:
    """The noise that all deltas of these groups are; None: they are more than that, or too coarse to tell."""
    measured = [(group, one) for group in groups for one in group.noise if group.energy > 0]
    known = [(group, one) for group, one in measured if math.isfinite(one.kurtosis)]
    if not known or len(known) < MANY * sum(group.experts for group in groups):
        return None
    kurtosis = _mean(one.kurtosis for _, one in known)
    spread = max(_mean(one.row_spread for _, one in known), _mean(one.column_spread for _, one in known))
    levels = [one.level * _of_one_copy(base, group.experts) for group, one in known]
    relative = [level / group.std for level, (group, _) in zip(levels, known, strict=True)]
    uneven = min(_unevenness(levels), _unevenness(relative))
    if abs(kurtosis - 3) > KURTOSIS or not spread < SPREAD or uneven > LEVELS:
        return None
    return Noise(_rms(levels), _rms(relative), kurtosis, spread)


def _of_one_copy(base: str, experts: int) -> float:
    """What the standard deviation of D is multiplied by for that of one copy's noise: its base has noise of its own."""
    if base == "mean":
        return math.sqrt(experts / (experts - 1))
    return math.sqrt(0.5) if base.startswith("expert:") else 1.0


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return sum(listed) / len(listed)


def _rms(numbers: Sequence[float]) -> float:
    return math.sqrt(_mean(number * number for number in numbers))


def _unevenness(numbers: Sequence[float]) -> float:
    """Standard deviation relative to the mean."""
    mean = _mean(numbers)
    return math.sqrt(max(_mean(number * number for number in numbers) - mean * mean, 0)) / mean


def _others(groups: Sequence[GroupFacts], kinds: dict[str, str | None], kind: str) -> list[GroupFacts]:
    """The groups that the kind of the model is about."""
    return [group for group in groups if kinds[group.name] == kind] or list(groups)


def _sentence(kind: str, groups: Sequence[GroupFacts], kinds: dict[str, str | None], noise: Noise | None) -> str:
    r, s = scaled_distance(_others(groups, kinds, kind))
    share = f"{r:.2%} of the weights' size" if r < 0.1 else f"{r:.0%} of the weights' size"
    if all(kind is None for kind in kinds.values()):
        return "Nothing can be said: all layers hold NaN or infinity. Repair the checkpoint first."
    if kind == "copies":
        return "Worth it: the experts are copies, bit for bit. One of them is all there is to keep."
    if kind == "noisy copies":
        return (
            f"Worth it: the experts are copies of one FFN with normal noise of {noise.of_weights:.2g} of the weights' size "
            "added; their differences hold nothing that was learnt."
        )
    if kind == "siblings":
        return (
            f"Worth it: the experts are siblings, fine-tuned from one ancestor; they differ from their mean by {share}."
        )
    if kind == "permuted":
        return "Worth a second look: the experts look unrelated, but their neurons match in another order (--align)."
    if kind == "relatives":
        return (
            f"Hardly worth it: the experts have a common ancestor, but it is far away; they differ from their mean by {share}, "
            f"{s:.2f} of what independent experts would. Lossy forms of such differences cost accuracy."
        )
    return (
        f"Not worth it: the experts are as different as independently trained ones. They differ from their mean by {share} "
        f"({s:.2f} of what independent experts would): lossy deltas would ruin them, and exact ones save little. Keep the model."
    )


def _sizes(groups: Sequence[GroupFacts], kinds: dict[str, str | None], kind: str) -> list[str]:
    about = [group for group in _others(groups, kinds, kind) if math.isfinite(group.energy)]
    if not about:
        return []
    r, s = scaled_distance(about)
    least, mean = min(group.cosine[0] for group in about), _mean(group.cosine[1] for group in about)
    equal = sum(group.equal * group.weights for group in about) / sum(group.weights for group in about)
    return [
        f"|W - mean| / |W| is {r:.3g}; of independent experts it would be {r / s:.3g}, so s = {s:.3g}."
        if s > 0
        else "The experts do not differ at all.",
        f"The cosine of two experts is {mean:.6f} on average, {least:.6f} at least.",
        f"{equal:.1%} of the weights are the base's, bit for bit.",
    ]


def _noise_reasons(noise: Noise | None, kind: str) -> list[str]:
    if noise is None or kind != "noisy copies":
        return []
    return [
        f"The differences are normally distributed (kurtosis {noise.kurtosis:.2f}, a Gaussian's is 3), and no row or column has "
        f"more than chance gives it (spread {noise.spread:.2f}, chance gives 1).",
        f"Each copy's noise has a standard deviation of {noise.std:.4g}, {noise.of_weights:.4g} of the weights' size.",
    ]


def _exceptions(groups: Sequence[GroupFacts], kinds: dict[str, str | None], kind: str) -> list[str]:
    """Layers of another kind than the model."""
    reasons = []
    for other in WORDS:
        layers = {group.layer for group in groups if kinds[group.name] == other}
        if other != kind and layers:
            reasons.append(f"Layers {in_ranges(layers)}: experts that {WORDS[other]}.")
    return reasons


def _strangers(groups: Sequence[GroupFacts]) -> list[str]:
    """Experts that are unlike all others, which are alike: a shared expert of its own, say."""
    odd: dict[str, int] = {}
    for group in groups:
        for label, cosine in zip(group.labels, group.to_others, strict=False):
            if group.experts > 2 and cosine < median(group.to_others) - STRANGE:
                odd[label] = odd.get(label, 0) + 1
    labels = [label for label, times in odd.items() if times >= MANY * len(groups)]
    return [f"Expert {label} is unlike the others; without it they are nearer to their mean." for label in labels]


def in_ranges(numbers: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0-2,5", as a recipe's `layers` takes it."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
