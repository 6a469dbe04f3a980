"""Experts whose neurons stand in another order: seeing it, and finding the order.

Neuron j of an expert is row j of gate and up and column j of down. To reorder the neurons of an FFN changes nothing that it
computes, but it makes equal experts look unrelated: no base is near both. So the order is undone before a base is taken
(aligned.py), and noted, as restoring needs it.

**Sketches.** A neuron is compared by a few numbers instead of its thousands: weights times random signs, summed in DIMS
buckets, for each of its rows and its column. Inner products survive that in the mean (count sketch; Charikar, Chen and
Farach-Colton, ICALP 2002): the cosine of two neurons' sketches is off by about 1 / sqrt(3 * DIMS) = 0.07. Equal neurons
have the same sketch bit by bit, as every sum is made in one order. Sketches are scaled and rounded to whole numbers whose
products sum exactly in fp32, so no matrix product's order of summation can change what is found.

**Matching.** Equal neurons first; then those that are near the neuron of the same number; then pairs of which each is the
other's nearest. The rest keep their places where they can. An assignment solver would find the best sum of all pairs for
inner^3 operations (3e12 at 14336 neurons); neurons of one ancestor are each other's nearest anyway, and any order restores
exactly: a wrong pair costs bytes, never a bit of the model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from ders_kernels.counter_rng import draw, make_key
from ders_kernels.cpu_ops import floats

from .aligned import AlignedSource, Orders, is_identity, layer_of
from .base import Base, DenseBase, ExpertBase
from .checkpoint.tensor import TensorSpec
from .engines import local
from .errors import UnsupportedError, UsageError
from .layouts import ExpertGroup
from .report import Progress, say, shown
from .source import BLOCK_WEIGHTS, PlainSource, Source, row_blocks

DIMS = 64  # numbers of a sketch, for each projection
LENGTH = 1024  # of a rounded sketch: three times its square is below 2^24, up to which fp32 counts exactly
MATCH = 0.5  # least cosine of a pair: seven times the 0.07 by which unrelated neurons' sketches scatter
CLEAR = 0.9  # from this cosine on a neuron is taken to be that of the same number without looking further
SAMPLE = 256  # neurons that are looked at first
UNRELATED = 1 / 4  # less of the neurons with a partner: another expert, whatever the order
PERMUTED = 1 / 32  # of the sample elsewhere: an expert is called permuted
ROUNDS = 4  # of nearest pairs among what is left
REFERENCES = 8  # experts that others are compared with, where they are unrelated among themselves
SIMILARITIES = 1 << 22  # cosines that are held at once: 16 MB

Groups = Mapping[str, ExpertGroup]  # one layer's, by projection


@lru_cache(maxsize=8)
def _signs(count: int) -> np.ndarray:
    """fp32 [count] of +1 and -1."""
    bits = draw(make_key(0, "neurons", "signs"), 0, count) >> np.uint32(31)
    return np.float32(1) - 2 * bits.astype(np.float32)


def _folded(weights: np.ndarray, width: int) -> np.ndarray:
    """fp32 [rows, in] -> [rows, width]: the second half is added to the first until no more are left. Overwrites its input."""
    wide = weights.shape[1]
    while wide > width:
        half = max(width, -(-wide // 2))
        weights[:, : wide - half] += weights[:, half:wide]
        wide = half
    return weights[:, :wide]


@dataclass(frozen=True)
class Neurons:
    """Finished sketches. vectors: fp32 [n, d], whole numbers; keys: equal for equal neurons; full: product of equals."""

    vectors: np.ndarray
    keys: list[bytes]
    full: float


class NeuronSketch:
    """The sketch of one expert, or of some of its neurons (ascending numbers), gathered block by block."""

    def __init__(self, groups: Groups, neurons: np.ndarray | None = None):
        inner = _inner(groups)
        self._whole, self._neurons = neurons is None, np.arange(inner) if neurons is None else neurons
        self._hidden = groups["down"].shape[0]
        shapes = {p: (self._neurons.size, _width(group)) for p, group in groups.items()}
        # down's as [buckets, n]: a row of weights is added to a row of sums
        self._sums = {p: np.zeros(s[::-1] if p == "down" else s, np.float32) for p, s in shapes.items()}

    def add(self, projection: str, rows: slice, bits: np.ndarray, dtype: str) -> None:
        """Stored bits [rows, in] of gate, up or down; rows of down in ascending order."""
        with np.errstate(all="ignore"):  # of weights that are not finite; `finished` leaves them out
            if projection == "down":
                self._add_columns(rows, bits if self._whole else np.ascontiguousarray(bits[:, self._neurons]), dtype)
            else:
                self._add_rows(self._sums[projection], rows, bits, dtype)

    def _add_rows(self, sums: np.ndarray, rows: slice, bits: np.ndarray, dtype: str) -> None:
        first, last = np.searchsorted(self._neurons, (rows.start, rows.stop))
        own = bits if self._whole else bits[self._neurons[first:last] - rows.start]
        sums[first:last] = _folded(floats.widen(own, dtype) * _signs(own.shape[1]), sums.shape[1])

    def _add_columns(self, rows: slice, bits: np.ndarray, dtype: str) -> None:
        sums, at = self._sums["down"], rows.start  # row r goes into bucket r % buckets, one after another
        weights = floats.widen(bits, dtype) * _signs(self._hidden)[rows, None]
        while at < rows.stop:
            bucket = at % sums.shape[0]
            end = min(rows.stop, at + sums.shape[0] - bucket)
            sums[bucket : bucket + end - at] += weights[at - rows.start : end - rows.start]
            at = end

    def finished(self) -> Neurons:
        parts = [sums.T if projection == "down" else sums for projection, sums in self._sums.items()]
        raw = np.concatenate(parts, axis=1)
        vectors = np.concatenate([_whole_numbers(part) for part in parts], axis=1)
        return Neurons(vectors, [row.tobytes() for row in raw], len(parts) * float(LENGTH) ** 2)


def _inner(groups: Groups) -> int:
    """Neurons of an expert."""
    return groups["up"].shape[0]


def _is_ffn(groups: Groups) -> bool:
    """Whether the matrices fit together, as in every layout; the ders.json of a stranger may say what it likes."""
    if not {"up", "down"} <= set(groups):
        return False
    labels = [[label for label, _ in group.members] for group in groups.values()]
    inner = {group.shape[1 if projection == "down" else 0] for projection, group in groups.items()}
    return len(inner) == 1 and all(own == labels[0] for own in labels)


def _width(group: ExpertGroup) -> int:
    """Buckets of one projection's sketch: no more than weights."""
    return min(DIMS, group.shape[0 if group.projection == "down" else 1])


def _whole_numbers(sums: np.ndarray) -> np.ndarray:
    """fp32 [n, d] -> rows of length LENGTH, rounded to whole numbers; rows of zeros where one is zero or not finite."""
    with np.errstate(all="ignore"):
        length = np.sqrt(np.square(sums, dtype=np.float64).sum(axis=1))
        found = np.rint(sums * (LENGTH / length)[:, None])
    found[~(np.isfinite(length) & (length > 0))] = 0
    return found.astype(np.float32)


# --- the order of one expert


def match(reference: Neurons, member: Neurons) -> tuple[np.ndarray, float]:
    """(order, share): neuron order[k] of the member is neuron k of the reference; of that share there was a clear partner.

    order is int32 [n] and always a permutation.
    """
    order = np.full(len(reference.keys), -1, np.int32)
    _match_equal(reference.keys, member.keys, order)
    both = np.intersect1d(*_open(order))
    same = (reference.vectors[both] * member.vectors[both]).sum(axis=1)
    clear = both[same >= CLEAR * member.full]
    order[clear] = clear
    if _promising(reference, member, order):
        for _ in range(ROUNDS):
            places, left = _open(order)
            at, who = _nearest_pairs(reference.vectors[places], member.vectors[left], MATCH * member.full)
            if not at.size:
                break
            order[places[at]] = left[who]
    share = float((order >= 0).mean())
    _fill(order)
    return order, share


def _open(order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference's places that have no partner yet, and the member's neurons that have no place, both ascending."""
    placed = np.zeros(order.size, bool)
    placed[order[order >= 0]] = True
    return np.flatnonzero(order < 0), np.flatnonzero(~placed)


def _match_equal(reference: list[bytes], member: list[bytes], order: np.ndarray) -> None:
    """Equal neurons; of several alike the k-th with the k-th, so what is in order stays so."""
    waiting: dict[bytes, list[int]] = {}
    for k, key in reversed(list(enumerate(reference))):
        waiting.setdefault(key, []).append(k)
    for j, key in enumerate(member):
        if waiting.get(key):
            order[waiting[key].pop()] = j


def _promising(reference: Neurons, member: Neurons, order: np.ndarray) -> bool:
    """Whether of a sample of the neurons that are left, some have their like in the reference: else no need to compare all."""
    places, left = _open(order)
    if left.size <= SAMPLE:
        return left.size > 0
    sample = member.vectors[left[:: left.size // SAMPLE]]
    nearest = (sample @ reference.vectors[places].T).max(axis=1)
    return bool((nearest >= MATCH * member.full).mean() >= PERMUTED)


def _nearest_pairs(reference: np.ndarray, member: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row of the reference, row of the member), each the other's nearest; of several as near, the first."""
    partner = np.zeros(len(member), np.int64)
    score, most = np.zeros(len(member), np.float32), np.full(len(reference), -np.inf, np.float32)
    step = max(1, SIMILARITIES // max(1, len(reference)))
    for begin in range(0, len(member), step):
        products = member[begin : begin + step] @ reference.T
        best = products.argmax(axis=1)
        partner[begin : begin + step], score[begin : begin + step] = best, products[np.arange(len(best)), best]
        np.maximum(most, products.max(axis=0), out=most)
    mutual = np.flatnonzero((score >= least) & (score == most[partner]))
    at, first = np.unique(partner[mutual], return_index=True)
    return at, mutual[first]


def _fill(order: np.ndarray) -> None:
    """What has no partner keeps its number where that place is free, and goes in ascending order where it is not."""
    own = np.intersect1d(*_open(order))
    order[own] = own
    places, left = _open(order)
    order[places] = left


# --- all experts


def find_orders(source: Source, jobs: int, progress: Progress, base: Base | None = None) -> Orders:
    """Layer -> label -> order int32 [inner] of every expert whose neurons do not stand as those of the first one.

    Neuron order[k] of the expert is neuron k of the first; experts that are not related to it are compared with the first
    of themselves. `base`: a dense model, or one of the experts, takes the first one's part. Raises UnsupportedError where a
    permuted expert has tensors beside its matrices that follow its neurons.
    """
    layers: dict[str, dict[str, ExpertGroup]] = {}
    for group in source.groups:
        layers.setdefault(layer_of(group), {})[group.projection] = group
    tasks = [partial(_layer_orders, source, groups, base, progress) for groups in layers.values()]
    found = dict(zip(layers, local.run(tasks, jobs), strict=True))
    for name, orders in found.items():
        if orders:
            _refuse_attached(source, layers[name])
    return {name: orders for name, orders in found.items() if orders}


def _layer_orders(source: Source, groups: Groups, base: Base | None, progress: Progress) -> dict[str, np.ndarray]:
    members = groups["up"].members
    references = [_dense_sketch(base, groups)] if isinstance(base, DenseBase) else []
    orders: dict[str, np.ndarray] = {}
    for member in _first_the_base(groups["up"], base):
        own = _sketch(source, groups, member, progress)
        for reference in references:
            order, share = match(reference, own)
            if share >= UNRELATED:
                orders[members[member][0]] = order
                break
        else:
            if len(references) < REFERENCES:
                references.append(own)
    for group in groups.values():
        source.done(group, range(len(group.members)))
    return {label: order for label, order in orders.items() if not is_identity(order)}


def _first_the_base(group: ExpertGroup, base: Base | None) -> list[int]:
    numbers = list(range(len(group.members)))
    if not isinstance(base, ExpertBase):
        return numbers
    base.check(group)
    return sorted(numbers, key=lambda i: f"expert:{group.members[i][0]}" != base.label)


def _sketch(source: Source, groups: Groups, member: int, progress: Progress) -> Neurons:
    sketch = NeuronSketch(groups)
    for projection, group in groups.items():
        for rows in source.blocks(group):
            bits = source.read(group, member, rows)
            sketch.add(projection, rows, bits, group.dtype)
            progress.advance(bits.nbytes)
    return sketch.finished()


def _dense_sketch(base: DenseBase, groups: Groups) -> Neurons:
    sketch = NeuronSketch(groups)
    for projection, group in groups.items():
        base.check(group)
        for rows in row_blocks(group.shape, max(1, BLOCK_WEIGHTS // group.shape[1])):
            sketch.add(projection, rows, base.rows(group, rows, _no_expert), group.dtype)
    return sketch.finished()


def _no_expert(member: int, rows: slice) -> np.ndarray:
    raise AssertionError("a dense base reads no expert")


def _refuse_attached(source: Source, groups: Groups) -> None:
    """Raise UnsupportedError where a copied tensor beside the experts' matrices has their neurons on an axis, such as a bias."""
    inner = _inner(groups)
    down = {bias for _, view in groups["down"].members for bias in _biases(view.tensor)}
    matrices = [view.tensor for p, group in groups.items() if p != "down" for _, view in group.members]
    near = tuple({place for tensor in matrices for place in _beside(tensor)})
    for name, spec in source.copied.items():
        if name.startswith(near) and name not in down and {inner, 2 * inner} & set(spec.shape):
            raise UnsupportedError(
                f"{name} {list(spec.shape)}: follows the neurons of experts that stand in another order, and --align reorders "
                "matrices alone; convert without it"
            )


def _biases(tensor: str) -> tuple[str, str]:
    return f"{tensor.removesuffix('weight')}bias", f"{tensor}_bias"


def _beside(tensor: str) -> Iterator[str]:
    """How names of tensors begin that belong to an expert's matrix: its own module's, and its expert's."""
    module = tensor.rpartition(".")[0]
    yield f"{module}."
    expert = module.rpartition(".")[0]
    if tensor.endswith(".weight") and expert.rpartition(".")[2].isdecimal():
        yield f"{expert}."


def aligned_source(source: Source, jobs: int, quiet: bool, base: Base | None = None) -> Source:
    """`source` with its experts' neurons in one order; as it is, with a note, where they are in one already.

    `base`: the one that the conversion will take. Raises UsageError for a DeRS checkpoint, whose base and deltas are made.
    """
    if not isinstance(source, PlainSource):
        raise UsageError(f"{source.reader.address}: is a DeRS checkpoint already; --align goes with the original model")
    total = sum(TensorSpec(g.shape, g.dtype).nbytes * len(g.members) for g in source.groups)
    with shown(f"aligning {source.reader.folder.name}", total, quiet) as progress:
        orders = find_orders(source, jobs, progress, base)
    if not orders:
        say("note: --align: all experts' neurons stand in one order already; nothing to undo")
        return source
    return AlignedSource(source, orders)


# --- analysis


class NeuronSketches:
    """Observer of one layer: whether experts' neurons stand in another order than those of the first expert.

    The first expert is sketched whole, of the others SAMPLE neurons; an expert of which less than PERMUTED of its neurons
    was moved may so be overlooked, which `find_orders` does not.
    """

    def __init__(self, groups: Groups):
        first = next(iter(groups.values()))
        self._labels, self._sketches = [label for label, _ in first.members], []
        if not _is_ffn(groups):
            return
        drawn = draw(make_key(0, "neurons", "sample"), 0, _inner(groups))
        self._sample = np.sort(np.argsort(drawn, kind="stable")[:SAMPLE])
        self._sketches = [NeuronSketch(groups, self._sample if i else None) for i in range(len(self._labels))]

    def add(self, block: Any) -> None:
        """An analysis.blocks.Block; that package stands a floor above."""
        for sketch, bits in zip(self._sketches, block.experts, strict=False):  # none, where the layer is no FFN
            sketch.add(block.group.projection, block.rows, bits, block.group.dtype)

    def found(self) -> dict[str, Any]:
        """{"permuted": {label: bool}, "matched": share of the sample, of all but the first, whose partner is clear}."""
        if not self._sketches:
            return {"permuted": dict.fromkeys(self._labels, False), "matched": 0.0}
        reference, *others = [sketch.finished() for sketch in self._sketches]
        permuted, matched = {self._labels[0]: False}, []
        for label, own in zip(self._labels[1:], others, strict=True):
            products = own.vectors @ reference.vectors.T  # [sample, inner]
            best, same = products.max(axis=1), products[np.arange(self._sample.size), self._sample]
            clear = best >= MATCH * own.full
            permuted[label] = bool((clear & (best > same + (1 - CLEAR) * own.full)).mean() >= PERMUTED)
            matched.append(float(clear.mean()))
        return {"permuted": permuted, "matched": float(np.mean(matched)) if matched else 1.0}
