"""A DeRS checkpoint's experts as kernels run them: FFN outputs from the packed parts, without making a weight.

    y = (act(x Bg' + x Dg') * (x Bu' + x Du')) Bd' + (...) Dd'

The products with a delta are `ders_kernels.dispatch.delta_matmul` on the parts as stored; bases, activation and biases (left
out) are as in compare.py. Beside them the same sum is made of deltas that the codec decodes, and the two must agree.

**How nearly.** An expert of `ders restore` is round(B + D), and that rounding is none of the kernels' doing: to bf16 it
moves every weight by up to 2^-8 of itself, 2^-9.2 in the mean square. An output moves as much, relative to its own
length; a light delta may move it less. A tolerance for it would let a wrong delta pass. So the decoded side is x B' + x D'
in fp32 as well: the expert before its last rounding, whose bits after it `verify` has already checked against ders.json.
What is left between the two sides is arithmetic:

- sums of n products in fp32, in another order. Their errors are random, sqrt(n) 2^-24 of the output when added one by
  one, less in blocks; sqrt(n) 2^-22 leaves room for outputs that are small beside their terms (n = 14336: 3e-5);
- the delta's product where a GPU rounds fp32 factors to tf32: by 2^-12.2 of each in the mean square (2^-11 at most), over
  three projections about 2^-11 of what the deltas add to the output. 2^-10 of that is allowed; hidden states narrowed
  to bf16 on the way, which nobody asked for, are 2^-8.7 off.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from ders_kernels import dispatch
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats
from ders_kernels.deltas import Delta

from .codecs import DeltaCodec
from .codecs.base import Parts
from .codecs.mixed import Family, families, family_of
from .compare import gated
from .errors import UsageError
from .layouts import ExpertGroup
from .runtime.deltas import packed_delta
from .runtime.dtypes import TORCH, from_bits
from .source import DersSource, Source

ARITHMETIC = 2.0**-22  # of the output's length, times sqrt(n)
DELTA = 2.0**-10  # of the length of what the deltas add to it
# Kernels have threads of their own, and Triton's interpreter is not made for several callers at once
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class Agreement:
    """Kernels' output against decoded output of one expert, relative to the latter's length."""

    distance: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.distance <= self.allowed


@dataclass
class LayerRun:
    """One layer: label -> output fp32 [tokens, hidden], and how near it is to the decoded expert's."""

    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    agreement: dict[str, Agreement] = field(default_factory=dict)  # empty if no group went through kernels


class ThroughKernels:
    """Runs a checkpoint's layers by a backend. Experts whose codec has no packed delta are decoded instead.

    Raises UsageError if the checkpoint isn't a DeRS one, or the backend refuses one of its deltas.
    """

    def __init__(self, source: Source, backend: str):
        if not isinstance(source, DersSource):
            raise UsageError(
                f"--backend {backend}: {source.reader.folder} is a plain checkpoint, which has nothing packed; "
                "expected a DeRS one (`ders compress` makes it)"
            )
        self._source, self._asked = source, backend
        cuda = backend in ("auto", "triton") and torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else "cpu")
        self.decoded: dict[str, str] = {}  # groups, or experts of them, that don't go through kernels: why
        asked: dict[Hashable, str | None] = {}
        for group in source.groups:
            for family in self._families(group):
                kind = (family.codec, group.shape, group.dtype, len(family.members))
                if kind not in asked:
                    asked[kind] = self._backend_of(group, family)
                if asked[kind] is None:
                    self.decoded[_where(group, family)] = _why_decoded(family.codec)
        self.backend = ", ".join(sorted(set(filter(None, asked.values())))) or backend

    def _families(self, group: ExpertGroup) -> tuple[Family, ...]:
        return families(self._source.codecs[group.name], len(group.members))

    def _runs(self, group: ExpertGroup, family: Family) -> bool:
        return _where(group, family) not in self.decoded

    def run(self, groups: dict[str, ExpertGroup], states: np.ndarray) -> LayerRun:
        """The groups of a layer by projection, states fp32 [tokens, hidden] -> outputs of the experts in all of them."""
        if not {"up", "down"} <= set(groups):
            return LayerRun()
        labels = [label for label, _ in groups["up"].members if all(label in dict(g.members) for g in groups.values())]
        x = states[None]
        with np.errstate(all="ignore"):
            inputs = {p: self._products(groups[p], labels, x, x) for p in ("gate", "up") if p in groups}
            h = [
                gated(inputs["gate"][i] if "gate" in inputs else None, inputs["up"][i], self._source.activation)
                for i in (0, 1)
            ]
            y, expected = self._products(groups["down"], labels, *h)
            base = self._base_output(groups, states)
            run = LayerRun(dict(zip(labels, y, strict=True)))
            if any(self._runs(group, family) for group in groups.values() for family in self._families(group)):
                terms = max(group.shape[1] for group in groups.values())
                pairs = zip(labels, y, expected, strict=True)
                run.agreement = {label: _agreement(a, b, base, terms) for label, a, b in pairs}
        return run

    def _products(
        self, group: ExpertGroup, labels: list[str], x: np.ndarray, x_decoded: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """x @ W.T by kernels and, for x_decoded, by decoding: [E or 1, T, in] each -> [E, T, out], W not rounded."""
        source, experts = self._source, len(labels)
        numbers = {label: i for i, (label, _) in enumerate(group.members)}
        shape = (experts, x.shape[1], group.shape[0])
        y, expected = np.empty(shape, np.float32), np.empty(shape, np.float32)
        y[:], expected[:] = self._base_product(group, x), self._base_product(group, x_decoded)
        x, x_decoded = (np.broadcast_to(each, (experts, *each.shape[1:])) for each in (x, x_decoded))
        held: dict[str, tuple[Parts, Delta]] = {}  # of each family that runs
        for e, label in enumerate(labels):
            family, place = family_of(source.codecs[group.name], len(group.members), numbers[label])
            if not self._runs(group, family):
                for rows in source.blocks(group):
                    weight = floats.widen(source.read(group, numbers[label], rows), group.dtype)
                    y[e, :, rows], expected[e, :, rows] = x[e] @ weight.T, x_decoded[e] @ weight.T
                continue
            if family.prefix not in held:
                held[family.prefix] = self._stored(group, family)
            parts, delta = held[family.prefix]
            own, key = {name: part[place] for name, part in parts.items()}, make_key(source.seed, group.name, label)
            for rows in source.blocks(group):
                expected[e, :, rows] += x_decoded[e] @ _delta_rows(family.codec, own, rows, group.shape, key).T
            y[e] += self._delta_product(x[e], delta, place)
        return y, expected

    def _stored(self, group: ExpertGroup, family: Family) -> tuple[Parts, Delta]:
        """A family's parts as they are on disk, and as the kernels take them."""
        specs = family.codec.spec(group.shape)
        parts = {name: self._source.reader.read(f"{group.name}.{family.prefix}{name}") for name in specs}
        stored = {name: from_bits(part, TORCH[specs[name].dtype]).to(self._device) for name, part in parts.items()}
        return parts, self._packed(group, family, stored)

    def _delta_product(self, x: np.ndarray, delta: Delta, member: int) -> np.ndarray:
        states = torch.tensor(x, device=self._device)
        with _ONE_AT_A_TIME:
            try:
                return dispatch.delta_matmul(states, delta, member, backend=self._asked).cpu().numpy()
            except dispatch.Refused as error:
                raise UsageError(f"--backend {self._asked}: {error}") from None

    def _base_product(self, group: ExpertGroup, x: np.ndarray) -> np.ndarray:
        """fp32 [..., T, in] -> x @ B.T, in blocks of rows"""
        rows = self._source.blocks(group)
        return np.concatenate(
            [x @ floats.widen(self._source.read_base(group, r), group.dtype).T for r in rows], axis=-1
        )

    def _base_output(self, groups: dict[str, ExpertGroup], states: np.ndarray) -> np.ndarray:
        gate = self._base_product(groups["gate"], states) if "gate" in groups else None
        hidden = gated(gate, self._base_product(groups["up"], states), self._source.activation)
        return self._base_product(groups["down"], hidden)

    def _packed(self, group: ExpertGroup, family: Family, parts: dict[str, torch.Tensor]) -> Delta | None:
        """Parts [E, ...] by name -> the family's delta."""
        labels = [group.members[member][0] for member in family.members]
        keys = tuple(make_key(self._source.seed, group.name, label) for label in labels)
        return packed_delta(family.codec, parts, group.shape[1], keys)

    def _backend_of(self, group: ExpertGroup, family: Family) -> str | None:
        """Which backend runs such experts, None: there is no packed delta. Asked before parts are read, of empty ones."""
        parts = {
            name: torch.empty(len(family.members), *spec.shape, dtype=TORCH[spec.dtype], device=self._device)
            for name, spec in family.codec.spec(group.shape).items()
            if spec is not None
        }
        delta = self._packed(group, family, parts)
        if delta is None:
            return None
        try:
            x = torch.empty(1, group.shape[1], device=self._device)
            module = dispatch.choose("delta_matmul", self._asked, x, delta)
        except dispatch.Refused as error:
            raise UsageError(f"--backend {self._asked}: {group.name}: {error}") from None
        return next(name for name, path in dispatch.BACKENDS.items() if path == module.__name__)


def _delta_rows(codec: DeltaCodec, own: Parts, rows: slice, shape: tuple[int, int], key: int) -> np.ndarray:
    """One expert's parts -> some rows of D, fp32."""
    parts = {name: part if name in codec.whole else part[rows] for name, part in own.items()}
    return codec.decode(parts, (rows.stop - rows.start, shape[1]), key, rows.start)


def _agreement(y: np.ndarray, expected: np.ndarray, base: np.ndarray, terms: int) -> Agreement:
    """Outputs by kernels, by decoding and of the base alone, of sums of so many terms."""
    distance, length, added = (
        float(np.linalg.norm(each.astype(np.float64))) for each in (y - expected, expected, expected - base)
    )
    if length == 0:
        return Agreement(0.0 if distance == 0 else math.inf, 0.0)
    return Agreement(distance / length, ARITHMETIC * math.sqrt(terms) + DELTA * added / length)


def _where(group: ExpertGroup, family: Family) -> str:
    """A group, or those of its experts that have one of its codecs."""
    if len(family.members) == len(group.members):
        return group.name
    return f"{group.name}, expert {', '.join(group.members[member][0] for member in family.members)}"


def _why_decoded(codec: DeltaCodec) -> str:
    if codec.lossless:
        return f"{codec.term}: deltas are counted in steps of the dtype, there is nothing to add"
    if not codec.spec((1, 1)):
        return f"{codec.term}: every expert is the base"
    return f"{codec.term}: no kernels for it"
