"""`ders analyze`: every layer read once, and from its numbers a verdict, codecs' costs and a recipe.

    headers -> per layer, in threads: blocks of rows -> observers (layer.py) -> verdict -> costs in bytes -> recommendation

The document is that of reports/document.py. The same command gives the same document with any number of threads.
"""

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .. import __version__
from ..activations import Activations
from ..base import Base, ExpertBase, MeanBase, make_base
from ..checkpoint.tensor import TensorSpec
from ..codecs import DeltaCodec, parse_codec
from ..compare import gated, random_states
from ..convert import Conversion
from ..engines import local
from ..errors import CheckpointError, UsageError
from ..layouts import ExpertGroup
from ..output import Options, carry
from ..plan import make_plan
from ..recipe import make_recipe
from ..report import say, shown
from ..source import DersSource, Source
from .blocks import layers_of
from .layer import LayerFound, Settings, cosines, mean, root_mean_square, rounded, study_layer
from .prediction import States
from .recommend import LIGHT, BaseFound, Cost, Recommendation, recommend
from .routers import find_routers
from .verdict import Verdict, judge

TERMS = ("exact", *LIGHT, "int8")
FEW_EXPERTS = 8  # up to so many, each is listed as a base
KEEP = "keep"  # what a plan says of an expert where the model is not worth converting
MOST_SPECTRA = (
    10  # layers of which one expert's singular values are taken: a second of CPU for a matrix of [14336, 4096]
)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for. base: as a recipe says it; states come from `text`, from `activations`, or at random."""

    base: str = "mean"
    terms: tuple[str, ...] = TERMS
    group_size: int = 128
    seed: int = 0
    tokens: int = 32
    text: Path | None = None
    activations: Path | None = None
    jobs: int = 1
    quiet: bool = True
    scratch: Path | None = None


def analyze(source: Source, asked: Asked) -> dict[str, Any]:
    """The analysis document of a checkpoint. Raises DersError kinds."""
    terms = dict.fromkeys(
        (*asked.terms, "exact")
    )  # which costs nothing to count, and is what is left where all else fails
    codecs = [parse_codec(term, asked.group_size) for term in terms]
    layers = layers_of(source)
    with ExitStack() as opened:
        bases = _Bases(source, asked)
        opened.callback(bases.close)
        states = opened.enter_context(_states(source, layers, asked))
        settings = Settings(bases.chosen, bases.others, codecs, asked.seed, _spread(list(layers)))
        found = _study(source, layers, states, settings, asked)
        source.check_unchanged()
        return _document(source, layers, found, bases, states, codecs, asked)


def _spread(names: list[str]) -> frozenset[str]:
    """MOST_SPECTRA of the layers at even distances, the first and the last among them."""
    count = min(MOST_SPECTRA, len(names))
    return frozenset(names[round(n * (len(names) - 1) / max(1, count - 1))] for n in range(count))


def _study(
    source: Source, layers: Mapping[str, Mapping[str, ExpertGroup]], states: "_States", settings: Settings, asked: Asked
) -> list[LayerFound]:
    def study(name: str) -> LayerFound:
        return study_layer(source, name, layers[name], states.of(name, layers[name]), settings, progress.advance)

    def ahead(number: int) -> None:
        for group in layers[names[number]].values():
            for tensor in source.tensors_of(group):
                source.reader.expect(tensor)

    names = list(layers)
    with shown(f"reading {source.reader.folder.name}", expert_bytes(source), asked.quiet) as progress:
        return local.run([partial(study, name) for name in names], asked.jobs, ahead)


def expert_bytes(source: Source) -> int:
    """Of all experts' matrices as the checkpoint's dtype has them."""
    return sum(TensorSpec(group.shape, group.dtype).nbytes * len(group.members) for group in source.groups)


class _Bases:
    """The chosen base, and those that it is compared with."""

    def __init__(self, source: Source, asked: Asked):
        if isinstance(source, DersSource):
            kept = source.manifest["recipe"]["base"]
            if asked.base not in ("mean", kept):
                raise UsageError(
                    f"{source.reader.address}: was decomposed with base {kept}; --base goes with the original model"
                )
            self.chosen, self.label, self.recipe = None, kept, "mean"
        else:
            self.chosen = make_base(asked.base, asked.scratch)
            self.label, self.recipe = self.chosen.label, asked.base
            for group in source.groups:
                self.chosen.check(group)
        beside: list[Base] = [MeanBase()]
        if all(len(group.members) > 1 for group in source.groups):
            beside.append(ExpertBase(0))
        self.others = {base.label: base for base in beside if base.label != self.label}

    def close(self) -> None:
        if self.chosen is not None:
            self.chosen.close()

    def found(self, layers: Sequence[LayerFound]) -> list[BaseFound]:
        """The chosen one first; with few experts, every expert."""
        energy = sum(fact.energy for layer in layers for fact in layer.facts if math.isfinite(fact.energy))
        labels = [label for label in layers[0].energy if all(label in layer.energy for layer in layers)]
        experts = [label for label in labels if label.startswith("expert:") and label != "expert:shared"]
        listed = ["", *self.others]
        listed += [label for label in experts if len(experts) <= FEW_EXPERTS and label not in (self.label, *listed)]
        return [self._found(label, layers, energy) for label in listed]

    def _found(self, label: str, layers: Sequence[LayerFound], energy: float) -> BaseFound:
        apart = sum(layer.energy[label] for layer in layers if math.isfinite(layer.energy.get(label, math.nan)))
        counted = [layer.exact_bytes.get(label) for layer in layers]
        return BaseFound(
            label or self.label,
            label or self.recipe,
            rounded(math.sqrt(apart / energy)) if energy else math.nan,
            None if None in counted else sum(counted),
        )


class _States:
    """The experts' inputs, layer by layer."""

    def __init__(self, kind: str, tokens: int, seed: int, opened: Activations | None = None):
        self.kind, self.tokens, self.seed, self._opened = kind, tokens, seed, opened

    def of(self, name: str, groups: Mapping[str, ExpertGroup]) -> States | None:
        """fp32 [tokens, hidden] for all experts, or for each; None: none."""
        group = groups["up"]
        if self.tokens == 0:
            return None
        if self._opened is None:
            return random_states(self.seed, group.layer, self.tokens, group.shape[1])
        labels = [label for label, _ in group.members]
        layer = self._opened.layer(name, labels)
        return {label: layer.of(label)[0][: self.tokens] for label in labels}

    def document(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokens": self.tokens, "seed": self.seed}


@contextmanager
def _states(source: Source, layers: Mapping[str, Any], asked: Asked) -> Iterator[_States]:
    try:
        one = np.zeros((1, 1), np.float32)
        gated(one, one, source.activation)
    except CheckpointError as error:
        say(f"note: no outputs are predicted: {error}")
        yield _States("random", 0, asked.seed)
        return
    if asked.text is None and asked.activations is None:
        yield _States("random", asked.tokens, asked.seed)
        return
    with ExitStack() as opened:
        path, kind = asked.activations, "activations"
        if asked.text is not None:
            from ..hf.collect import collect  # torch and transformers

            folder = opened.enter_context(TemporaryDirectory(prefix="ders-states-", dir=asked.scratch))
            path, kind = Path(folder) / "states.safetensors", "text"
            collect(source, asked.text, asked.tokens, asked.seed, path)
        states = opened.enter_context(Activations(path))
        states.check(source.groups)
        yield _States(kind, min(asked.tokens, *(states.tokens(name) for name in layers)), asked.seed, states)


def _document(
    source: Source,
    layers: Mapping[str, Mapping[str, ExpertGroup]],
    found: Sequence[LayerFound],
    bases: _Bases,
    states: _States,
    codecs: Sequence[DeltaCodec],
    asked: Asked,
) -> dict[str, Any]:
    facts = [fact for layer in found for fact in layer.facts]
    groups = [group for layer in found for group in layer.groups]
    verdict = judge(facts, bases.label)
    source_bytes = sum((source.reader.folder / file).stat().st_size for file in source.reader.files)
    settings = {"group_size": asked.group_size, "seed": asked.seed, "shared": source.shared}
    odd = {name for name, kind in verdict.of_groups.items() if kind != verdict.kind}
    alike = [layer for layer in found if not any(fact.name in odd for fact in layer.facts)]
    costs = {codec.term: _cost(source, bases, found, alike or found, codec, settings) for codec in codecs}
    compared = bases.found(found)
    without = [error for layer in alike or found for error in layer.base_errors.values()]
    of_none = root_mean_square(without), max((error for error in without if not math.isnan(error)), default=math.nan)
    ruled = {term: _with_rules(cost, term, groups, odd) for term, cost in costs.items()}
    beside = sum(path.stat().st_size for path in carry(source.reader.folder))  # which the output folder holds too
    recommended = recommend(verdict, facts, ruled, compared, source_bytes + beside, settings, of_none)
    if isinstance(source, DersSource) and not source.lossless:
        recommended = Recommendation(
            None, "Keep it: its deltas are lossy already. Analyze and convert the original model."
        )
    weights = sum(fact.weights for fact in facts)
    return {
        "schema": 1,
        "kind": "analysis",
        "command": "analyze",
        "tool": f"ders-cli {__version__}",
        "model": source.reader.address,
        "architecture": source.form()["layout"],
        "layers": len(layers),
        "experts": max(fact.experts for fact in facts),
        "dtype": "+".join(dict.fromkeys(group.dtype for group in source.groups)),
        "bytes": {"source": source_bytes, "experts": expert_bytes(source)},
        "weights": weights,
        "base": bases.label,
        "states": states.document(),
        "groups": _planned(source, groups, verdict, recommended),
        "routers": [
            {"layer": router.layer, "name": router.name, "cosine": cosines(router.cosine)}
            for router in find_routers(source, layers)
        ],
        "bases": [
            {"base": base.label, "relative_norm": base.relative_norm, "exact_bytes": base.exact_bytes}
            for base in compared
        ],
        "alignment": _alignment(found),
        "codecs": {term: _codec_document(term, cost, weights, found) for term, cost in costs.items()},
        "verdict": {
            "kind": verdict.kind,
            "says": verdict.says,
            "reasons": verdict.reasons,
            "noise": verdict.noise
            and {"std": rounded(verdict.noise.std), "of_weights": rounded(verdict.noise.of_weights)},
        },
        "recommended": {"recipe": recommended.recipe, "says": recommended.says},
    }


def _cost(
    source: Source,
    bases: _Bases,
    found: Sequence[LayerFound],
    alike: Sequence[LayerFound],
    codec: DeltaCodec,
    settings: Mapping[str, Any],
) -> Cost:
    """Bytes of all layers, as a conversion's plan has them, an exact stream as it was counted; errors of the layers that are
    as the model is: a recipe keeps the others exactly."""
    recipe = make_recipe({"delta": codec.term, "base": "mean", **settings}).model_copy(update={"base": bases.label})
    plan = make_plan(source, recipe, bases.chosen, Options().max_shard_bytes)
    totals = Conversion(source, recipe, bases.chosen, plan, Path("out"), Options()).totals()
    groups = [group for layer in found for group in layer.groups]
    delta_bytes = sum(group["codecs"][codec.term]["bytes"] for group in groups)
    fixed = sum(spec.nbytes for unit in plan.units for part, spec in unit.parts.items() if spec and ".delta." in part)
    streams = delta_bytes - fixed if codec.lossless else 0
    errors = [error for layer in alike for error in layer.output_errors[codec.term].values()]
    return Cost(
        delta_bytes,
        totals["output_bytes"] - plan.stream_bound + streams,
        0.0 if codec.lossless else root_mean_square(errors),
        max((error for error in errors if not math.isnan(error)), default=0.0 if codec.lossless else math.nan),
        mean(group["codecs"][codec.term]["kept"] for layer in alike for group in layer.groups),
    )


def _with_rules(cost: Cost, term: str, groups: Sequence[Mapping[str, Any]], odd: Set[str]) -> Cost:
    """What a recipe takes that keeps the groups named in `odd` exactly."""
    kept = [group["codecs"] for group in groups if group["name"] in odd]
    more = sum(codecs["exact"]["bytes"] - codecs[term]["bytes"] for codecs in kept)
    return replace(cost, delta_bytes=cost.delta_bytes + more, folder_bytes=cost.folder_bytes + more)


def _codec_document(term: str, cost: Cost, weights: int, found: Sequence[LayerFound]) -> dict[str, Any]:
    """As the report has it: errors of all layers."""
    errors = {
        f"{layer.name}, expert {label}": error
        for layer in found
        for label, error in layer.output_errors[term].items()
        if not math.isnan(error)
    }
    worst = max(errors, key=lambda name: errors[name], default=None)
    nothing = cost.output_error == 0 and not errors  # of `exact`
    return {
        "delta_bytes": cost.delta_bytes,
        "folder_bytes": cost.folder_bytes,
        "bits_per_delta_weight": rounded(8 * cost.delta_bytes / weights),
        "output_error": 0.0 if nothing else rounded(root_mean_square(errors.values())),
        "worst_output_error": 0.0 if nothing else errors.get(worst, math.nan),
        "worst": worst,
    }


def _planned(
    source: Source, groups: list[dict[str, Any]], verdict: Verdict, recommended: Recommendation
) -> list[dict[str, Any]]:
    """The groups with their verdict and the codec that each expert gets."""
    by_name = {group.name: group for group in source.groups}
    recipe = make_recipe(recommended.recipe) if recommended.recipe else None
    planned = []
    for group in groups:
        experts = len(group["experts"])
        terms = [codec.term for codec in recipe.codecs(by_name[group["name"]])] if recipe else [KEEP] * experts
        planned.append(group | {"verdict": verdict.of_groups[group["name"]], "plan": terms})
    return planned


def _alignment(found: Sequence[LayerFound]) -> dict[str, Any]:
    layers = [
        {
            "name": layer.name,
            "experts": [label for label, moved in layer.alignment["permuted"].items() if moved],
            "matched": rounded(layer.alignment["matched"]),
        }
        for layer in found
    ]
    moved = [layer for layer in layers if layer["experts"]]
    return {"permuted": bool(moved), "layers": moved}
