"""One layer's numbers: all observers over one pass, and what they found, as the report says it.

Fields are those of reports/document.py; a number that is not known is NaN here and null there.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..alignment import NeuronSketches
from ..base import Base
from ..codecs import DeltaCodec
from ..layouts import ExpertGroup
from ..source import Source
from .blocks import Observer, observe_layer
from .gram import Gram
from .moments import DENSITIES, Moments, MomentsFound
from .noise import Noise
from .prediction import LayerPrediction, Predicted, States, combined
from .spectra import LayerSpectra, RankEnergy, WholePrediction
from .steps import Steps
from .verdict import GroupFacts

MOST_PAIRS = 64  # experts beyond which not every pair's cosine is told
ERRORS = ("weight_error", "delta_error", "kept", "output_error", "output_delta_error")

_Found = dict[str, dict[str, dict[str, Predicted]]]  # projection -> label -> term -> what was predicted


@dataclass(frozen=True)
class Settings:
    """What every layer is measured against and with. `others`: bases beside the chosen one, by label."""

    base: Base | None  # None: the source is a DeRS checkpoint that brings its own
    others: Mapping[str, Base]
    codecs: Sequence[DeltaCodec]
    seed: int
    spectra: frozenset[str]  # layers of which one expert's singular values are taken


@dataclass(frozen=True)
class LayerFound:
    """What was found of one layer. groups: as the report has them, without verdict and plan.

    energy, exact_bytes: {base: ...} over all experts, "" the chosen one; output_errors: {term: {label: all projections}};
    base_errors: {label: |y_base - y| / |y|}, the base in the expert's place.
    """

    name: str
    groups: list[dict[str, Any]]
    facts: list[GroupFacts]
    alignment: dict[str, Any]
    energy: dict[str, float]
    exact_bytes: dict[str, int]
    output_errors: dict[str, dict[str, float]]
    base_errors: dict[str, float]


class _Statistics:
    """The observers of one layer that know nothing of codecs."""

    def __init__(self) -> None:
        self.gram, self.moments, self.steps, self.noise = Gram(), Moments(), Steps(), Noise()

    @property
    def observers(self) -> list[Observer]:
        return [self.gram, self.moments, self.steps, self.noise]

    def document(self, group: ExpertGroup) -> dict[str, Any]:
        """A group as the report has it, without what comes of codecs."""
        products = self.gram.found(group.projection)
        each, counted = self.moments.found(group.projection), self.steps.found(group.projection)
        sizes = zip(products.delta_norms, products.norms, strict=True)
        return {
            "name": group.name,
            "layer": group.layer,
            "projection": group.projection,
            "shape": list(group.shape),
            "dtype": group.dtype,
            "experts": [label for label, _ in group.members],
            "cosine": cosines(products.cosine),
            "delta": {
                "relative_norm": [rounded(d / w if w else math.nan) for d, w in sizes],
                "cosine_to_base": [round(float(c), 9) for c in products.to_base],
                "equal": [rounded(one.equal) for one in counted],
                "entropy": [rounded(one.entropy) for one in counted],
                "kurtosis": [rounded(one.kurtosis) for one in each],
                "outlier": [rounded(one.outlier) for one in each],
                "std": [rounded(one.std) for one in each],
            },
            "density_energy": _density_energy(each),
        }

    def facts(self, group: ExpertGroup, permuted: tuple[str, ...]) -> GroupFacts:
        """A group as a verdict sees it."""
        products, counted = self.gram.found(group.projection), self.steps.found(group.projection)
        alike = cosines(products.cosine)
        return GroupFacts(
            name=group.name,
            layer=group.layer,
            projection=group.projection,
            labels=tuple(label for label, _ in group.members),
            weights=group.shape[0] * group.shape[1] * len(group.members),
            energy=float((products.norms**2).sum()),
            mean_energy=products.energy["mean"],
            cosine=(alike["least"], alike["mean"]),
            copied=all(one.copied for one in counted),
            equal=float(np.mean([one.equal for one in counted])),
            to_others=tuple(((products.cosine.sum(axis=1) - 1) / max(1, len(counted) - 1)).tolist()),
            permuted=permuted,
            noise=tuple(self.noise.found(group.projection)),
        )


def study_layer(
    source: Source,
    name: str,
    groups: Mapping[str, ExpertGroup],
    states: States | None,
    settings: Settings,
    advance: Callable[[int], None],
) -> LayerFound:
    """Read the layer once. `states`: inputs of the experts, None: no outputs are predicted."""
    statistics, sketches = _Statistics(), NeuronSketches(groups)
    spectra = LayerSpectra(groups, settings.seed) if name in settings.spectra else None
    predictions = _predictions(groups, source.activation, states, settings)
    observers = [*statistics.observers, sketches, *([spectra] if spectra else []), *predictions]
    observe_layer(source, settings.base, groups, observers, advance, settings.others)

    with np.errstate(all="ignore"):  # what is not finite comes out as NaN
        predicted = _merged([one.found() for one in predictions], groups)
    alignment, documents = sketches.found(), []
    for projection, group in groups.items():
        sizes = [one.bytes for one in statistics.steps.found(projection)]
        codecs = {codec.term: _codec(codec, group, sizes, predicted[projection]) for codec in settings.codecs}
        energy = _rank_energy(spectra.found()[projection] if spectra else None)
        documents.append(statistics.document(group) | {"rank_energy": energy, "codecs": codecs})
    permuted = tuple(label for label, moved in alignment["permuted"].items() if moved)
    energies = [statistics.gram.found(projection).energy for projection in groups]
    return LayerFound(
        name=name,
        groups=documents,
        facts=[statistics.facts(group, permuted) for group in groups.values()],
        alignment=alignment,
        energy={label: sum(energy[label] for energy in energies) for label in energies[0]},
        exact_bytes={
            label: sum(one.bytes for projection in groups for one in statistics.steps.found(projection, label))
            for label in ("", *settings.others)
        },
        output_errors=_output_errors(predicted, settings.codecs),
        base_errors=predictions[0].base_errors(),
    )


def _predictions(
    groups: Mapping[str, ExpertGroup], activation: str, states: States | None, settings: Settings
) -> list[LayerPrediction]:
    """First of codecs whose rows encode apart, of all experts; then of those that take whole matrices, of one expert."""
    lossy = [codec for codec in settings.codecs if not codec.lossless]
    whole = [codec for codec in lossy if codec.block_rows(groups["up"].shape) is not None]
    apart = [codec for codec in lossy if codec not in whole]
    found = [LayerPrediction(groups, activation, states, apart, settings.seed)]
    return found + ([WholePrediction(groups, activation, states, whole, settings.seed)] if whole else [])


def _merged(found: Sequence[_Found], projections: Iterable[str]) -> _Found:
    """projection -> label -> term -> what was predicted of it."""
    merged: _Found = {projection: {} for projection in projections}
    for one in found:
        for projection, experts in one.items():
            for label, codecs in experts.items():
                merged[projection][label] = merged[projection].get(label, {}) | codecs
    return merged


def _rank_energy(found: RankEnergy | None) -> dict[str, Any] | None:
    if found is None:
        return None
    energy, error = ([rounded(number) for number in numbers] for numbers in (found.energy, found.error))
    return asdict(found) | {"ranks": list(found.ranks), "energy": energy, "error": error}


def rounded(number: float) -> float:
    """Six digits."""
    return float(f"{number:.6g}")


def cosines(cosine: np.ndarray) -> dict[str, Any]:
    """Of [E, E] to nine decimals: 0.999998 and 0.999999 are not the same. One expert is only like itself."""
    pairs = np.round(cosine, 9)
    apart = pairs[~np.eye(len(pairs), dtype=bool)] if len(pairs) > 1 else pairs.ravel()
    return {
        "least": float(apart.min()),
        "mean": round(float(apart.mean()), 9),
        "most": float(apart.max()),
        "pairs": pairs.tolist() if len(pairs) <= MOST_PAIRS else None,
    }


def _density_energy(experts: Sequence[MomentsFound]) -> dict[str, Any]:
    known = [one.density_energy for one in experts if not any(map(math.isnan, one.density_energy))]
    means = np.mean(known, axis=0) if known else np.full(len(DENSITIES), math.nan)
    return {"densities": list(DENSITIES), "energy": [rounded(float(mean)) for mean in means]}


def _codec(
    codec: DeltaCodec, group: ExpertGroup, exact_bytes: Sequence[int], predicted: Mapping[str, Mapping[str, Predicted]]
) -> dict[str, Any]:
    if codec.lossless:
        return {"bytes": sum(exact_bytes)} | dict.fromkeys(ERRORS, 0.0) | {"kept": 1.0}
    size = sum(spec.nbytes for spec in codec.spec(group.shape).values() if spec) * len(group.members)
    found = [of_expert[codec.term] for of_expert in predicted.values() if codec.term in of_expert]
    errors = {name: rounded(root_mean_square(getattr(one, name) for one in found)) for name in ERRORS}
    return {"bytes": size} | errors | {"kept": rounded(mean(one.kept for one in found))}


def root_mean_square(numbers: Iterable[float]) -> float:
    """Of those that are known; NaN where none is."""
    known = [number * number for number in numbers if not math.isnan(number)]
    return math.sqrt(sum(known) / len(known)) if known else math.nan


def mean(numbers: Iterable[float]) -> float:
    """The same."""
    known = [number for number in numbers if not math.isnan(number)]
    return sum(known) / len(known) if known else math.nan


def _output_errors(predicted: _Found, codecs: Sequence[DeltaCodec]) -> dict[str, dict[str, float]]:
    """{term: {label: error of the expert's outputs, all its projections coded}}; of `exact` nothing is left to tell."""
    return {
        codec.term: {
            label: combined(experts[label][codec.term].output_error for experts in predicted.values())
            for label, terms in predicted["up"].items()
            if codec.term in terms
        }
        for codec in codecs
    }
