"""One budget for the ranks of all deltas: components in order of the energy that they bring per byte.

Component j of matrix m brings s_{m,j}^2 of the deltas' energy for 2 (out + in) bytes. Taken in order of s^2 / (out + in) until nothing
more fits, the energy that is left out is least, where all matrices cost the same per rank; else to within one component. (The
sparsity of CoDyRA, arXiv 2501.13187, as an allocation.) Where they cost the same, as gate, up and down of an FFN do, the ranks are those
that one *soft threshold* xi gives all matrices, X = U max(S - xi, 0) V^T with the kept ranks refitted (SoRA, arXiv
2311.11696): `threshold`, the largest singular value that is left out, is reported.

Low rank shrinks every delta. That costs far more than its error says (docs/codecs.md), so a budget spends ranks
only where it is asked to (`--delta rank`), beside no other codec, and predicts the deltas' error, not the outputs'.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats, lowrank

from ..base import Base
from ..checkpoint.tensor import TensorSpec
from ..engines import local
from ..errors import CheckpointError
from ..layouts import ExpertGroup
from ..report import Progress, shown
from ..source import DersSource, Source
from .choice import Choice

FACTOR_BYTES = 2  # of a number of rankR's factors: bf16
SPREAD = 4  # a matrix is decomposed to so many times the mean rank that the budget allows, and gets no more
LEAST_RANK = 8  # that it is decomposed to


@dataclass(frozen=True)
class Spectrum:
    """One matrix of one expert: its largest singular values, descending, and the energy of its whole delta."""

    layer: int
    projection: str
    label: str
    shape: tuple[int, int]
    values: np.ndarray  # fp64 [K]
    energy: float

    @property
    def price(self) -> int:
        """Bytes of one rank."""
        return FACTOR_BYTES * sum(self.shape)


def allocate(spectra: Sequence[Spectrum], capacity: int) -> Choice:
    """choice.options[m] is matrix m's rank; choice.cost the energy that is left out, in shares of all."""
    counts = [len(spectrum.values) for spectrum in spectra]
    matrix = np.repeat(np.arange(len(spectra)), counts)
    gains = np.concatenate([spectrum.values**2 for spectrum in spectra])
    prices = np.repeat([spectrum.price for spectrum in spectra], counts)
    place = np.concatenate([np.arange(count) for count in counts])
    order = np.lexsort((place, matrix, -gains / prices))
    ranks = np.zeros(len(spectra), np.int64)
    used = np.cumsum(prices[order])
    fit = int(np.searchsorted(used, capacity, side="right"))
    np.add.at(ranks, matrix[order[:fit]], 1)
    room = capacity - (int(used[fit - 1]) if fit else 0)
    bound_gain = float(gains[order[:fit]].sum())
    if fit < len(order):
        bound_gain += float(gains[order[fit]] * room / prices[order[fit]])
    cheapest = min(spectrum.price for spectrum in spectra)
    for n in order[fit:]:
        if room < cheapest:
            break
        if prices[n] <= room and ranks[matrix[n]] == place[n]:
            ranks[matrix[n]] += 1
            room -= int(prices[n])
    return _choice(spectra, ranks, bound_gain)


def same_rank(spectra: Sequence[Spectrum], rank: int) -> Choice:
    """One rank for all matrices, as far as they have it."""
    return _choice(spectra, np.array([min(rank, len(s.values)) for s in spectra]), math.inf)


def _choice(spectra: Sequence[Spectrum], ranks: np.ndarray, bound_gain: float) -> Choice:
    total = math.fsum(spectrum.energy for spectrum in spectra) or 1.0
    gain = math.fsum(float((s.values[:r] ** 2).sum()) for s, r in zip(spectra, ranks, strict=True))
    size = sum(s.price * int(r) for s, r in zip(spectra, ranks, strict=True))
    cost, bound = max(0.0, 1 - gain / total), max(0.0, 1 - bound_gain / total)
    exact = cost <= bound * (1 + 1e-9) or len({spectrum.price for spectrum in spectra}) == 1
    return Choice(
        tuple(map(int, ranks)), size, cost, cost if exact else bound, exact, 0.0 if exact else cost / bound - 1
    )


def threshold(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """The largest singular value that is left out: the soft threshold that keeps at most these ranks."""
    return max((float(s.values[r]) for s, r in zip(spectra, ranks, strict=True) if r < len(s.values)), default=0.0)


def spectra_of(source: Source, base: Base | None, capacity: int, seed: int, jobs: int, quiet: bool) -> list[Spectrum]:
    """Every matrix's spectrum, as far as `capacity` bytes could reach. Memory: a matrix and its base in fp32 per thread."""
    each = sum(FACTOR_BYTES * sum(group.shape) * len(group.members) for group in source.groups)
    most = max(LEAST_RANK, SPREAD * math.ceil(capacity / each))
    total = sum(TensorSpec(group.shape, group.dtype).nbytes * len(group.members) for group in source.groups)
    with shown("decomposing deltas", total, quiet) as progress:
        tasks = [partial(_of_group, source, base, group, most, seed, progress) for group in source.groups]
        return [spectrum for found in local.run(tasks, jobs) for spectrum in found]


def _of_group(
    source: Source, base: Base | None, group: ExpertGroup, most: int, seed: int, progress: Progress
) -> list[Spectrum]:
    blocks = list(source.blocks(group))
    bases = [_base(source, base, group, rows) for rows in blocks]
    found = []
    for i, (label, _) in enumerate(group.members):
        delta = np.empty(group.shape, np.float32)
        for rows, bits in zip(blocks, bases, strict=True):
            delta[rows] = floats.delta(source.read(group, i, rows), bits, group.dtype)
        if floats.first_nonfinite(delta) >= 0:
            raise CheckpointError(
                f"{group.name}, expert {label}: a weight, or its base's, is not finite; only --delta exact keeps such values"
            )
        key = make_key(seed, group.name, label)
        left, _ = lowrank.factors(delta, min(most, *group.shape), key)
        values = np.square(left.astype(np.float64)).sum(axis=0)  # each factor has the root of its singular value
        energy = float(np.square(delta.astype(np.float64)).sum())
        found.append(Spectrum(group.layer, group.projection, label, group.shape, values, energy))
        progress.advance(TensorSpec(group.shape, group.dtype).nbytes)
    source.done(group, range(len(group.members)))
    return found


def _base(source: Source, base: Base | None, group: ExpertGroup, rows: slice) -> np.ndarray:
    if base is None:
        assert isinstance(source, DersSource)
        return source.read_base(group, rows)
    return base.rows(group, rows, partial(source.read, group))
