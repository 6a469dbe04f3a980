"""Two checkpoints' experts side by side: weight, delta and output errors, and what kind of fault a difference is.

A layer is one task. Its gate, up and down matrices are read once, block by block; the same rows go into the error
sums and, times some hidden states, into the outputs of the FFN

    y = down(act(gate x) * up x)        without gate: down(act(up x));  biases aside

of the expert, of the reference and of the base alone. Output error is |y' - y| relative to |y|, and to |y - y_base|.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from blake3 import blake3
from ders_kernels.cpu_ops import floats

from .aligned import AlignedSource
from .base import MEAN_BYTES, mean
from .checkpoint.tensor import TensorSpec
from .differences import Differences
from .errors import CheckpointError
from .layouts import ExpertGroup
from .source import BLOCK_WEIGHTS, DersSource, Source, row_blocks


@dataclass
class Matched:
    """One expert matrix in both checkpoints."""

    group: ExpertGroup
    label: str
    hash: str  # of the checkpoint under test
    reference_hash: str
    errors: dict[str, float]
    diagnosis: str = ""  # for a difference: what it looks like


@dataclass
class LayerResult:
    """`output`: label -> {"output", "output_delta"}; `kernels`: what ran the tested outputs, if it wasn't this file."""

    name: str
    matrices: list[Matched] = field(default_factory=list)
    output: dict[str, dict[str, float]] = field(default_factory=dict)
    kernels: "KernelRun | None" = None


@dataclass(frozen=True)
class Layer:
    """The groups of one MoE layer, in both checkpoints, by projection."""

    name: str
    number: int
    tested: dict[str, ExpertGroup]
    reference: dict[str, ExpertGroup]


class KernelRun(Protocol):
    """The tested experts' outputs as kernels gave them (through_kernels.py): label -> fp32 [tokens, hidden]."""

    outputs: dict[str, np.ndarray]


def layer_name(group: ExpertGroup) -> str:
    """model.layers.3.mlp.experts, of model.layers.3.mlp.experts.gate_proj."""
    return group.name.rpartition(".")[0]


def random_states(seed: int, layer: int, tokens: int, width: int) -> np.ndarray:
    """fp32 [tokens, width], standard normal: what a hidden state looks like behind a norm of weight 1."""
    key = hashlib.sha256(f"hidden/{seed}/{layer}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return generator.standard_normal((tokens, width), np.float32)


def compare_layer(
    tested: Source,
    reference: Source,
    layer: Layer,
    states: np.ndarray | None,
    advance: Callable[[int], None],
    run_kernels: Callable[[dict[str, ExpertGroup], np.ndarray], KernelRun] | None = None,
) -> LayerResult:
    """Compare every expert of one layer. `states` fp32 [tokens, hidden], or None where outputs are not wanted.

    With `run_kernels` the outputs under test are what it makes of the tested groups, not those of the decoded weights.
    """
    result = LayerResult(layer.name)
    outputs = (
        _Outputs(states, tested.activation) if states is not None and {"up", "down"} <= set(layer.tested) else None
    )
    for projection in (p for p in ("gate", "up", "down") if p in layer.tested):
        group, other = layer.tested[projection], layer.reference[projection]
        result.matrices += _compare_group(tested, reference, group, other, outputs, advance)
    if outputs is not None:
        result.kernels = run_kernels(layer.tested, states) if run_kernels else None
        result.output = outputs.errors(result.kernels.outputs if result.kernels else {})
    return result


def _blocks(tested: Source, reference: Source, group: ExpertGroup, other: ExpertGroup) -> Iterator[slice]:
    """Row blocks that suit both: a lossless stream's own chunks if there is one, several where others are better read so."""
    row_bytes, chunk = TensorSpec((1, group.shape[1]), group.dtype).nbytes * len(other.members), 0
    step = max(1, min(BLOCK_WEIGHTS // max(1, group.shape[1]), MEAN_BYTES // max(1, row_bytes)))
    for source, its in ((reference, other), (tested, group)):
        if isinstance(source, DersSource) and source.codecs[its.name].lossless:
            step = source.chunk_rows(its)
        elif isinstance(source, AlignedSource):
            chunk = source.chunk_rows(its) or 0
    return row_blocks(group.shape, max(step, chunk // step * step))


def _compare_group(
    tested: Source,
    reference: Source,
    group: ExpertGroup,
    other: ExpertGroup,
    outputs: "_Outputs | None",
    advance: Callable[[int], None],
) -> list[Matched]:
    at = {label: i for i, (label, _) in enumerate(other.members)}
    pairs = [(i, at[label], label) for i, (label, _) in enumerate(group.members) if label in at]
    own, its = {label: blake3() for *_, label in pairs}, {label: blake3() for *_, label in pairs}
    differences = {label: Differences() for *_, label in pairs}
    zero, first_bad = dict.fromkeys(differences, True), {}
    own_sum, its_sum = dict.fromkeys(differences, 0), dict.fromkeys(differences, 0)
    for rows in _blocks(tested, reference, group, other):
        held = None
        if isinstance(tested, DersSource):
            base = tested.read_base(group, rows)
        elif isinstance(reference, DersSource):
            base = reference.read_base(other, rows)
        else:
            held = [reference.read(other, j, rows) for j in range(len(other.members))]
            base = mean(held, other.dtype)
        if outputs is not None:
            outputs.add("base", None, group.projection, rows, floats.widen(base, group.dtype))
        experts = tested.read_experts(group, [i for i, *_ in pairs], rows)
        for (_, j, label), bits in zip(pairs, experts, strict=True):
            theirs = held[j] if held else reference.read(other, j, rows)
            own[label].update(bits.reshape(-1).view(np.uint8))
            its[label].update(theirs.reshape(-1).view(np.uint8))
            own_sum[label] += int(bits.sum(dtype=np.uint64))
            its_sum[label] += int(theirs.sum(dtype=np.uint64))
            finite = differences[label].add(theirs, bits, base, group.dtype)
            if not finite and (bad := floats.first_nonfinite(floats.widen(bits, group.dtype))) >= 0:
                first_bad.setdefault(label, (rows.start + bad // bits.shape[1], bad % bits.shape[1]))
            zero[label] = zero[label] and not (bits << 1).any()  # but for the sign; as numbers, numpy warns of NaNs
            if outputs is not None:
                outputs.add("tested", label, group.projection, rows, floats.widen(bits, group.dtype))
                outputs.add("reference", label, group.projection, rows, floats.widen(theirs, group.dtype))
            advance(bits.nbytes)
    found = []
    digests = {label: digest.hexdigest() for label, digest in its.items()}
    labels = {digest: label for label, digest in reversed(digests.items())}
    for i, j, label in pairs:
        matched = Matched(
            group,
            label,
            own[label].hexdigest(),
            digests[label],
            differences[label].errors(),
        )
        if matched.hash != matched.reference_hash:
            alike = [name for name, total in its_sum.items() if total == own_sum[label]]
            matched.diagnosis = _diagnose(
                tested, reference, group, other, i, j, matched, labels, alike, zero[label], first_bad.get(label)
            )
        found.append(matched)
    return found


def _diagnose(
    tested, reference, group, other, i, j, matched: Matched, labels: dict[str, str], alike: list[str], zero: bool, bad
) -> str:
    """What a difference looks like. `labels`: {hash: the reference's expert that has it}; `alike`: those of the same sum."""
    if bad is not None:
        return f"NaN or infinity at [{bad[0]}, {bad[1]}]"
    if holds := labels.get(matched.hash) or _reordered(tested, reference, group, other, i, matched, labels, alike):
        return f"holds the reference's expert {holds}"
    if zero:
        return "is all zeros"
    if group.shape[0] == group.shape[1] and matched.errors["weight"] > 0.5:
        if np.array_equal(_whole(tested, group, i), _whole(reference, other, j).T):
            return "is transposed"
    return ""


def _reordered(
    tested, reference, group, other, i, matched: Matched, labels: dict[str, str], alike: list[str]
) -> str | None:
    """As `labels` says, where one checkpoint was read in the other's order: each expert in its own, so a swapped one in a
    stranger's. In any order it has the same sum of bits, so only experts `alike` in that are read again."""
    if isinstance(reference, AlignedSource):
        order = reference.order(other, matched.label)
        members = [(j, label) for j, (label, _) in enumerate(other.members) if label in alike]
        return next((label for j, label in members if _hash_in(reference, other, j, order) == matched.hash), None)
    if isinstance(tested, AlignedSource):
        held = ((label, _hash_in(tested, group, i, tested.order(group, label))) for label in alike)
        return next((label for label, digest in held if labels.get(digest) == label), None)
    return None


def _hash_in(source: AlignedSource, group: ExpertGroup, member: int, order: np.ndarray) -> str:
    digest = blake3()
    for rows in source.blocks(group):
        digest.update(source.read_in(group, member, rows, order).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _whole(source: Source, group: ExpertGroup, member: int) -> np.ndarray:
    return np.concatenate([source.read(group, member, rows) for rows in source.blocks(group)])


class _Outputs:
    """FFN outputs of every expert of a layer, gathered block by block: hidden rows first, then down's rows."""

    def __init__(self, states: np.ndarray, activation: str):
        self._x, self._activation = states, activation
        self._hidden: dict[tuple[str, str | None, str], list[np.ndarray]] = {}
        self._ready: dict[tuple[str, str | None], np.ndarray] = {}
        self._down: dict[tuple[str, str | None], list[np.ndarray]] = {}

    def add(self, whose: str, label: str | None, projection: str, rows: slice, weight: np.ndarray) -> None:
        """fp32 weight [rows, in], in ascending order of rows; gate and up before down."""
        with np.errstate(all="ignore"):
            if projection != "down":
                self._hidden.setdefault((whose, label, projection), []).append(self._x @ weight.T)
                return
            if (whose, label) not in self._ready:
                self._ready[whose, label] = self._activate(whose, label)
            self._down.setdefault((whose, label), []).append(self._ready[whose, label] @ weight.T)

    def _activate(self, whose: str, label: str | None) -> np.ndarray:
        up = np.concatenate(self._hidden.pop((whose, label, "up")), axis=1)
        if (whose, label, "gate") not in self._hidden:
            return gated(None, up, self._activation)
        return gated(np.concatenate(self._hidden.pop((whose, label, "gate")), axis=1), up, self._activation)

    def errors(self, kernels: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """`kernels`: outputs by label that take the place of those gathered here for the checkpoint under test."""
        whole = {key: np.concatenate(parts, axis=1).astype(np.float64) for key, parts in self._down.items()}
        whole |= {("tested", label): y.astype(np.float64) for label, y in kernels.items() if ("tested", label) in whole}
        found = {}
        for label in (label for whose, label in whole if whose == "tested"):
            y, expected, base = whole["tested", label], whole["reference", label], whole["base", None]
            with np.errstate(over="ignore", invalid="ignore"):  # of weights near the largest, outputs are infinite
                error = np.linalg.norm(y - expected)
                scales = {"output": np.linalg.norm(expected), "output_delta": np.linalg.norm(expected - base)}
                found[label] = {k: float(f"{_ratio(error, scale):.5e}") for k, scale in scales.items()}
        return found


def _ratio(error: float, scale: float) -> float:
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale > 0 else (0.0 if error == 0 else math.inf)


def gated(gate: np.ndarray | None, up: np.ndarray, name: str) -> np.ndarray:
    """fp32 products with gate (None: there is none) and up -> what goes into down."""
    if gate is None:
        return activate(up, name)
    if name == "gpt_oss":  # clamped, sigmoid of 1.702 gate, and 1 added to up
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        return gate / (1 + np.exp(-1.702 * gate)) * up
    return activate(gate, name) * up


def activate(x: np.ndarray, name: str) -> np.ndarray:
    """The FFN's activation, fp32, by its name in config.json."""
    if name in ("silu", "swish"):
        return x / (1 + np.exp(-x))
    if name in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return (x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / math.sqrt(2)))).astype(np.float32)
    if name in ("relu", "relu2"):
        return np.maximum(x, 0) ** (2 if name == "relu2" else 1)
    raise CheckpointError(
        f"config.json: activation {name!r:.40} is not one that ders can compute outputs with; `ders verify` takes --no-output"
    )
