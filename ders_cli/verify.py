"""Proof of a conversion, anybody's: of a DeRS checkpoint by itself, or of any two MoE checkpoints against each other.

Alone, a DeRS checkpoint is intact if every tensor and file has its hash in ders.json, and every expert still decodes
to the bits noted at conversion: with the exact codec, to the original's. A plain checkpoint alone is read through:
all experts there, none with a NaN or an infinity, none all zero.

Against a reference, experts are matched by layer, projection and number, in whatever form the files keep them. They
must be equal bit for bit, unless a bound is given, or the tested one is a lossy DeRS conversion of just this
reference: then the errors must be those noted at conversion. All other tensors must be equal.

With a backend the outputs under test are made by kernels from the packed parts, and must be those of the decoded
experts (through_kernels.py).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ders_kernels.cpu_ops import floats

from .aligned import in_one_order
from .checkpoint.reader import read_header
from .checkpoint.tensor import FLOATS, STORAGE, TensorSpec
from .compare import Layer, LayerResult, Matched, compare_layer, layer_name, random_states
from .engines import local
from .errors import CheckpointError, UsageError
from .findings import Report
from .integrity import Found, damage, decodes, intact, readable
from .layouts import ExpertGroup, unsliced
from .report import Progress, shown
from .source import DersSource, Source

if TYPE_CHECKING:  # they need torch
    from .through_kernels import LayerRun, ThroughKernels

NOTED = 1e-3  # relative: errors noted at conversion have six digits, and their sums another order


@dataclass(frozen=True)
class Bounds:
    """What a difference may be; None: not asked for."""

    error: float | None = None  # relative Frobenius error of a weight matrix
    output_error: float | None = None
    cosine: float | None = None

    @property
    def given(self) -> bool:
        return (self.error, self.output_error, self.cosine) != (None, None, None)


def verify(
    tested: Source,
    reference: Source | None,
    bounds: Bounds,
    hidden: Path | None,
    outputs: bool,
    tokens: int,
    seed: int,
    jobs: int,
    quiet: bool,
    backend: str | None = None,
) -> Report:
    """Check `tested` by itself and, if given, against `reference`; by the kernels of a backend, if one is named."""
    through = _kernels(tested, backend, outputs) if backend else None
    if reference is not None:
        tested, reference = in_one_order(tested, reference)
    report = Report(tested.reader.address, reference.reader.address if reference else None)
    if through:
        report.kernels = {"backend": through.backend, "experts": [], "decoded": through.decoded}
    expert_bytes = sum(TensorSpec(g.shape, g.dtype).nbytes * len(g.members) for g in tested.groups)
    with shown(f"verifying {tested.reader.folder.name}", expert_bytes, quiet) as progress:
        states = _states(hidden) if hidden and (reference or through) else None
        layers = _match(tested, reference, report) if reference is not None else []
        if isinstance(tested, DersSource):
            intact(tested, report, _compared_whole(layers), jobs, progress)
        elif reference is None:
            readable(tested, report, jobs, progress)
        if reference is not None:
            tasks = [
                partial(
                    _layer,
                    tested,
                    reference,
                    layer,
                    _states_of(layer, states, seed, tokens) if outputs else None,
                    progress,
                    through.run if through else None,
                )
                for layer in layers
            ]
            for found, result in local.run(tasks, jobs):
                for where, problem in found:
                    report.add(where, problem)
                if result is not None:
                    _judge(tested, result, bounds, report)
                if result is not None and result.kernels:
                    _judge_kernels(result.name, result.kernels, report)
            _compare_others(tested, reference, report)
        elif through:
            layers = _layers(tested)
            tasks = [partial(through.run, la.tested, _states_of(la, states, seed, tokens)) for la in layers]
            for layer, run in zip(layers, local.run(tasks, jobs), strict=True):
                _judge_kernels(layer.name, run, report)
    return report


# --- two checkpoints


def _layer(
    tested: Source,
    reference: Source,
    layer: Layer,
    states: np.ndarray | None,
    progress: Progress,
    run_kernels: "Callable[[dict[str, ExpertGroup], np.ndarray], LayerRun] | None",
) -> tuple[Found, LayerResult | None]:
    """One layer, read once: its stored tensors' hashes, then its experts beside the reference's.

    Where an expert does not decode there is nothing to compare: which ones they are is found.
    """
    whole = [group for group in layer.tested.values() if group.name in _compared_whole([layer])]
    stored = isinstance(tested, DersSource)
    found = [check for group in whole for check in damage(tested, tested.tensors_of(group))] if stored else []
    try:
        return found, compare_layer(tested, reference, layer, states, progress.advance, run_kernels)
    except CheckpointError:
        broken = [check for group in whole for check in decodes(tested, group, progress)] if stored else []
        if not any(problem for _, problem in broken):
            raise
        return found + broken, None
    finally:
        for source, groups in ((tested, layer.tested), (reference, layer.reference)):
            for group in groups.values():
                source.done(group, range(len(group.members)))


def _compared_whole(layers: list[Layer]) -> set[str]:
    """Names of the groups of which every expert under test has its counterpart."""
    pairs = [(group, layer.reference[projection]) for layer in layers for projection, group in layer.tested.items()]
    return {group.name for group, other in pairs if dict(group.members).keys() <= dict(other.members).keys()}


def _match(tested: Source, reference: Source, report: Report) -> list[Layer]:
    """Layers that both have in equal shapes; what only one has is a finding."""
    theirs = {group.name: group for group in _cut(reference, tested)}
    matched: dict[str, list[tuple[ExpertGroup, ExpertGroup]]] = defaultdict(list)
    for group in _cut(tested, reference):
        other = theirs.pop(group.name, None)
        if other is None:
            report.add(group.name, "not in the reference")
            continue
        mine, others = [label for label, _ in group.members], [label for label, _ in other.members]
        for label in sorted(set(mine) ^ set(others)):
            report.add(f"{group.name}, expert {label}", "missing" if label in others else "not in the reference")
        if group.shape != other.shape:
            hint = "; is it transposed?" if group.shape == other.shape[::-1] else ""
            report.add(group.name, f"expected {list(other.shape)}, found {list(group.shape)}{hint}")
        elif group.dtype != other.dtype:
            report.add(group.name, f"expected dtype {other.dtype}, found {group.dtype}")
        else:
            matched[layer_name(group)].append((group, other))
    for name in theirs:
        report.add(name, "missing: only the reference has these experts")
    return [
        Layer(name, pairs[0][0].layer, {g.projection: g for g, _ in pairs}, {o.projection: o for _, o in pairs})
        for name, pairs in matched.items()
    ]


def _cut(source: Source, like: Source) -> Iterator[ExpertGroup]:
    """A source's groups, cut into fine-grained slices (blueprint.py) where the other has them so."""
    slices = defaultdict(list)
    for group in like.groups:
        slices[unsliced(group.name)].append(group)
    for group in source.groups:
        theirs = slices.get(group.name, [])
        if not theirs or theirs[0].name == group.name:
            yield group
            continue
        if isinstance(source, DersSource):
            raise UsageError(
                f"{source.reader.address}: has no slices where {like.reader.address} has; `ders restore` one of them first"
            )
        left = dict(group.members)
        for part in theirs:
            own = tuple((label, left.pop(label)) for label, _ in part.members if label in left)
            if own:
                yield replace(group, name=part.name, members=own)
        if left:  # experts that no slice names
            yield replace(group, members=tuple(left.items()))


def _judge(tested: Source, result: LayerResult, bounds: Bounds, report: Report) -> None:
    for matched in result.matrices:
        output = result.output.get(matched.label, {})
        report.experts.append(
            {
                "group": matched.group.name,
                "layer": matched.group.layer,
                "projection": matched.group.projection,
                "expert": matched.label,
                "equal": matched.hash == matched.reference_hash,
                **matched.errors,
                **output,
            }
        )
        where, noted = f"{matched.group.name}, expert {matched.label}", _noted(tested, matched)
        if noted is not None and matched.hash != noted["restored_hash"]:
            report.add(where, "does not decode to the bits noted at conversion")
        report.add(where, _problem(matched, noted, output, bounds))


def _problem(matched: Matched, noted: dict[str, Any] | None, output: dict[str, float], bounds: Bounds) -> str:
    """Why a difference is one, or "". `noted`: what ders.json says of the expert, if it comes from a DeRS checkpoint."""
    if matched.hash == matched.reference_hash:
        return ""
    errors, said = matched.errors, f" ({matched.diagnosis})" if matched.diagnosis else ""
    if not bounds.given and noted is not None and noted["source_hash"] != matched.reference_hash:
        return f"was converted from another expert than the reference's{said}; error {errors['weight']:.3g}"
    if bounds.given:
        passed = [
            f"{name} {value:.3g}, bound {bound:g}"
            for name, value, bound, over in (
                (
                    "weight error",
                    errors["weight"],
                    bounds.error,
                    bounds.error is not None and not errors["weight"] <= bounds.error,
                ),
                (
                    "output error",
                    output.get("output", 0.0),
                    bounds.output_error,
                    bounds.output_error is not None and not output.get("output", 0.0) <= bounds.output_error,
                ),
                (
                    "cosine",
                    errors["cosine"],
                    bounds.cosine,
                    bounds.cosine is not None and not errors["cosine"] >= bounds.cosine,
                ),
            )
            if over
        ]
        return "; ".join(passed) + said if passed else ""
    if noted is None:
        view = dict(matched.group.members)[matched.label]
        return f"{view.tensor}: differs{said}: weight error {errors['weight']:.3g}, largest {errors['max_abs']:.3g}"
    found, expected = errors["weight"], noted["error"]["weight"]
    if (
        found != expected and not abs(found - expected) <= NOTED * expected
    ):  # both are infinite where the expert is all zeros
        return f"weight error {found:.6g}, noted at conversion {expected:.6g}{said}"
    return ""


def _noted(tested: Source, matched: Matched) -> dict[str, Any] | None:
    """What ders.json says of an expert, or None for a plain checkpoint."""
    if not isinstance(tested, DersSource):
        return None
    return tested.noted(matched.group, matched.label)


def _compare_others(tested: Source, reference: Source, report: Report) -> None:
    """Router, attention, norms, embeddings, biases: equal bytes under equal canonical names."""
    mine, theirs = (
        {source.aliases.get(name, name): name for name in source.copied if name not in source.aligned}
        for source in (tested, reference)
    )
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs:
            report.add(name, "missing" if name in theirs else "not in the reference")
            continue
        here, there = tested.copied[mine[name]], reference.copied[theirs[name]]
        if here != there:
            report.add(name, f"expected {there.dtype} {list(there.shape)}, found {here.dtype} {list(here.shape)}")
        else:
            report.add(
                name, "" if tested.reader.hashes(mine[name]) == reference.reader.hashes(theirs[name]) else "differs"
            )


# --- kernels


def _kernels(tested: Source, backend: str, outputs: bool) -> "ThroughKernels":
    if not outputs:
        raise UsageError("--backend runs the FFN's outputs, --no-output leaves them out; expected one of the two")
    try:
        from .through_kernels import ThroughKernels
    except ImportError as error:
        raise UsageError(f"--backend {backend}: {error}; pip install torch") from None
    return ThroughKernels(tested, backend)


def _layers(source: Source) -> list[Layer]:
    """The layers of one checkpoint."""
    groups: dict[str, dict[str, ExpertGroup]] = defaultdict(dict)
    for group in source.groups:
        groups[layer_name(group)][group.projection] = group
    return [Layer(name, next(iter(own.values())).layer, own, {}) for name, own in groups.items()]


def _judge_kernels(layer: str, run: "LayerRun", report: Report) -> None:
    for label, found in run.agreement.items():
        report.kernels["experts"].append(
            {"layer": layer, "expert": label, "distance": found.distance, "allowed": found.allowed}
        )
        off = f"{found.distance:.2e} of its output's length, allowed {found.allowed:.2e}"
        problem = "" if found.holds else f"kernels ({report.kernels['backend']}) differ from the decoded expert: {off}"
        report.add(f"{layer}, expert {label}", problem)


# --- hidden states


def _states(path: Path) -> dict[str, np.ndarray]:
    """fp32 tensors of a safetensors file: `hidden_states` [tokens, hidden] for all layers, or `layers.N` for each."""
    if not path.is_file():
        raise UsageError(f"--hidden {path}: no such file")
    try:
        header, found = read_header(path), {}
    except CheckpointError as error:
        raise UsageError(f"--hidden: expected a safetensors file: {error}") from None
    for name, spec in header.tensors.items():
        if spec.dtype not in FLOATS or len(spec.shape) != 2:
            raise UsageError(
                f"--hidden {path}: {name}: expected [tokens, hidden] of {', '.join(FLOATS)}, found {spec.dtype} {list(spec.shape)}"
            )
        bits = np.fromfile(path, STORAGE[spec.dtype], spec.size, offset=header.begins[name])
        found[name] = floats.widen(bits, spec.dtype).reshape(spec.shape)
    return found


def _states_of(layer: Layer, given: dict[str, np.ndarray] | None, seed: int, tokens: int) -> np.ndarray:
    width = layer.tested["up" if "up" in layer.tested else next(iter(layer.tested))].shape[1]
    if given is None:
        return random_states(seed, layer.number, tokens, width)
    states = given.get(f"layers.{layer.number}", given.get("hidden_states"))
    if states is None:
        raise UsageError(f"--hidden: no tensor layers.{layer.number} and no hidden_states")
    if states.shape[1] != width:
        raise UsageError(f"--hidden: layer {layer.number}: expected width {width}, found {list(states.shape)}")
    return states
