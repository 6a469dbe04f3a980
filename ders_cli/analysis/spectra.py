"""How much of an expert's delta a low rank holds, and what codecs make of it that take whole matrices: of one expert a layer.

The energy of the best rank r is the sum of the r largest squared singular values. Small matrices: exactly, from D^T D.
Large ones: by subspace iteration from random probes (Halko, Martinsson, Tropp, arXiv 0909.4061, 4.5). After each product
with D or D^T the best r directions found hold a little more, never more than there is; what is still missing is
extrapolated from the last two gains as from a geometric series (Aitken's delta-squared process), and is the error too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from ders_kernels.counter_rng import draw, make_key

from ..codecs import DeltaCodec
from ..codecs.sparse import SparseCodec
from ..errors import UsageError
from ..layouts import ExpertGroup
from .blocks import Block
from .outputs import energy
from .prediction import LayerPrediction, States

RANKS = (1, 2, 4, 8, 16, 32, 64)
OVERSAMPLE = 8
PRODUCTS = 6  # with D and D^T in turn, after the first
EXACT_WIDTH = 1024  # up to here D^T D and its eigenvalues cost no more than the products


@dataclass(frozen=True)
class RankEnergy:
    """Shares of |D|^2 that the best approximations of some ranks hold.

    error: the true share lies within energy +- error, but for matrices of an almost flat spectrum, where it may be a
    little above. rank90, rank99: the least rank that holds so much; None: beyond what was computed.
    """

    expert: str
    ranks: tuple[int, ...]
    energy: tuple[float, ...]
    error: tuple[float, ...]
    rank90: int | None
    rank99: int | None


def rotating(groups: Mapping[str, ExpertGroup], seed: int) -> int:
    """The member of a layer's groups whose whole matrices are held: another one in each layer."""
    return (groups["up"].layer + seed) % len(groups["up"].members)


class LayerSpectra:
    """An observer of one layer's blocks (blocks.py): of one expert, which rotates with the layer, the whole fp32 delta is held."""

    def __init__(self, groups: Mapping[str, ExpertGroup], seed: int, ranks: Sequence[int] = RANKS):
        self._seed, self._ranks = seed, tuple(ranks)
        self._member = rotating(groups, seed)
        self._delta = np.empty((0, 0), np.float32)
        self._found: dict[str, RankEnergy | None] = {}

    def add(self, block: Block) -> None:
        """The next rows of all experts."""
        group, rows = block.group, block.rows
        if rows.start == 0:
            self._delta = np.empty(group.shape, np.float32)
        self._delta[rows] = block.delta(self._member)
        if rows.stop == group.shape[0]:
            label = group.members[self._member][0]
            key = make_key(self._seed, f"{group.name}/probes", label)
            self._found[group.projection] = rank_energy(self._delta, label, self._ranks, key)
            self._delta = np.empty((0, 0), np.float32)

    def found(self) -> dict[str, RankEnergy | None]:
        """projection -> energies; None where the delta is zero or not finite."""
        return self._found


def rank_energy(delta: np.ndarray, label: str, ranks: Sequence[int], key: int) -> RankEnergy | None:
    """Of fp32 [out, in], which is overwritten; None if it is zero or not finite. key: of the probes."""
    largest = max(delta.max(initial=0), -delta.min(initial=0))  # no copy of a large matrix; a NaN stays
    if not (np.isfinite(largest) and largest > 0):
        return None
    delta /= largest  # so that no square is past fp32
    total, least = energy(delta), min(delta.shape)
    if least <= EXACT_WIDTH:
        shares, missing = _exact_energies(delta) / total, np.zeros(least)
    else:
        shares, missing = (held / total for held in _iterated_energies(delta, max(ranks), key))
    shares = np.minimum(shares, 1)
    at = [min(rank, least) - 1 for rank in ranks]
    return RankEnergy(
        label,
        tuple(ranks),
        tuple(shares[at].tolist()),
        tuple(missing[at].tolist()),
        *(int(np.argmax(shares >= share)) + 1 if shares[-1] >= share else None for share in (0.9, 0.99)),
    )


def _exact_energies(delta: np.ndarray) -> np.ndarray:
    """fp64 [min(out, in)]: energy of the best rank 1, 2, ..."""
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    squares = np.linalg.eigvalsh((tall.T @ tall).astype(np.float64))[::-1]
    return np.cumsum(np.maximum(squares, 0))


def _iterated_energies(delta: np.ndarray, most: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """fp64 [most]: energy of the best rank 1, 2, ..., `most`, and how much of it is extrapolated."""
    probes = min(most + OVERSAMPLE, *delta.shape)
    uniform = draw(key, 0, delta.shape[1] * probes).astype(np.float64) * 2.0**-32 - 0.5
    basis, _ = np.linalg.qr(delta @ uniform.reshape(-1, probes).astype(np.float32))
    held = []
    for number in range(PRODUCTS):
        basis, triangle = np.linalg.qr((delta if number % 2 else delta.T) @ basis)
        values = np.linalg.svd(triangle, compute_uv=False).astype(np.float64)
        held.append(np.cumsum(values * values)[:most])
    gained, last = held[-2] - held[-3], held[-1] - held[-2]
    gained, last = np.maximum(gained, 0), np.maximum(np.minimum(last, gained), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        missing = np.where(last > 0, last * last / np.maximum(gained - last, last / 16), 0)  # at most 16 such gains
    return held[-1] + missing, missing


class WholePrediction(LayerPrediction):
    """Predictions of codecs that take whole matrices, such as rankR: of one expert a layer, held a matrix at a time.

    All rows are coded and the sampled ones measured, as LayerPrediction does. Held beside what it holds: the stored bits of
    a matrix and its base, what a codec makes of it, and fp32 copies of one of them.
    """

    def __init__(
        self,
        groups: Mapping[str, ExpertGroup],
        activation: str,
        states: States | None,
        codecs: Sequence[DeltaCodec],
        seed: int,
        rows: int = 256,
        label: str | None = None,
    ):
        """As LayerPrediction. label: of the expert; None: `rotating` says which. Raises UsageError on sparseP."""
        labels = [label for label, _ in groups["up"].members]
        self._member = labels.index(label) if label is not None else rotating(groups, seed)
        alone = {p: replace(group, members=(group.members[self._member],)) for p, group in groups.items()}
        super().__init__(alone, activation, states, codecs, seed, rows)
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []  # stored bits [rows, in] of the expert and of the base
        self._whole: dict[DeltaCodec, np.ndarray] = {}  # stored bits that a codec makes of the matrix

    def _check(self, codec: DeltaCodec, shape: tuple[int, int]) -> None:
        if isinstance(codec, SparseCodec):
            raise UsageError(f"{codec.term}: a form to train; nothing to predict. To keep random entries use dropP")

    def add(self, block: Block) -> None:
        """The next rows of all experts."""
        self._rows.append((block.experts[self._member], block.base))
        if block.rows.stop == block.group.shape[0]:
            expert, base = (np.concatenate(parts) for parts in zip(*self._rows, strict=True))
            self._rows.clear()
            group = self._groups[block.group.projection]
            super().add(Block(group, slice(0, group.shape[0]), [expert], base))
            self._whole.clear()

    def _code(self, codec: DeltaCodec, block: Block, i: int, rows: slice) -> np.ndarray:
        if codec not in self._whole:
            self._whole[codec] = super()._code(codec, block, i, slice(0, block.rows.stop))
        return self._whole[codec][rows]
