"""What each codec would make of a layer's experts: bytes to the byte, errors from some rows, before anything is converted.

A codec whose rows encode independently is run on a sample of every matrix's rows, on the stored bits, with the generator
keys and row numbers that a conversion has: the sampled rows come out as the conversion would write them. Weight errors are
those of the sampled rows; energies of output errors are scaled by rows / sampled rows. The outputs themselves are exact.
Where a matrix has no more rows than are wanted, all of it is exact.

Scaling takes the neurons' errors as uncorrelated, and `combined` those of an expert's matrices. On a real MoE that is so to 1.5 %
for codecs that keep the delta's size, with random states. Real states have a large common part: there codecs that draw (drop,
ternary) stay right, those that choose by size come out low, int4 by 4 %, int3 and 2:4 by 10 %, `none` by a quarter.

Held per layer: h [inner, T] of every expert and the base, and of the sampled neurons S the changes [S, T] of every codec,
and [S, S]. Where these would pass HELD_BYTES there are fewer tokens and fewer sampled neurons, the same for all codecs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats

from ..codecs import DeltaCodec
from ..codecs.base import NonFiniteError
from ..codecs.exact import ExactCodec
from ..compare import layer_name
from ..differences import Differences
from ..errors import UsageError
from ..layouts import ExpertGroup
from .blocks import Block
from .outputs import ChangedFfn, Ffn, Sample

HELD_BYTES = 64 << 20  # of hidden products, and as much again of the sampled neurons' changes
LEAST_TOKENS, LEAST_NEURONS = 8, 32  # fewer would say little; a layer of thousands of experts holds more

States = np.ndarray | Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Predicted:
    """What one codec would make of one expert's matrix, all other matrices left as they are.

    An error is NaN where it is not known: anywhere in the matrix, its base, or what the codec makes of them, there is a number
    that is not finite, or, of outputs, there is no token or no `down`. It is infinite relative to nothing, such as an expert
    of zeros.
    """

    bytes: int | None  # of its parts on disk; None: of an exact stream that was not counted
    weight_error: float  # |W' - W| / |W|
    delta_error: float  # |W' - W| / |D|
    kept: float  # <D', D> / |D|^2
    output_error: float  # |y' - y| / |y|, over all tokens
    output_delta_error: float  # |y' - y| / |y - y_base|


def combined(errors: Iterable[float]) -> float:
    """The error of several matrices coded at once, such as an expert's three: their errors are nearly uncorrelated."""
    return math.sqrt(sum(error * error for error in errors))


class LayerPrediction:
    """An observer of one layer's blocks (blocks.py); `found` when all were seen."""

    def __init__(
        self,
        groups: Mapping[str, ExpertGroup],
        activation: str,
        states: States | None,
        codecs: Sequence[DeltaCodec],
        seed: int,
        rows: int = 256,
        exact_bytes: bool = False,
        labels: Sequence[str] | None = None,
    ):
        """groups: projection -> group. states: fp32 [T, hidden] for all experts, or for each label; None: no outputs.

        codecs: of different terms, whose rows encode apart (spectra.py has the others), or `exact`, whose error is 0.
        seed: of the conversion that is predicted, and of the sample. rows: sampled of each matrix, about.
        exact_bytes: `exact` is run over all rows; this holds a chunk, 2^20 weights, of each expert.
        labels: the experts that are predicted; None: all. Raises UsageError on a codec that takes a whole matrix.
        """
        self._groups, self._codecs, self._seed = dict(groups), tuple(codecs), seed
        self._sampled = [codec for codec in codecs if not codec.lossless]
        for codec in self._sampled:
            self._check(codec, groups["up"].shape)
        members = enumerate(label for label, _ in groups["up"].members)
        self._labels = {i: label for i, label in members if labels is None or label in labels}
        self._differences = {(p, i): [Differences() for _ in self._sampled] for p in groups for i in self._labels}
        self._refused: set[tuple[str, int, int]] = set()  # projection, expert, codec
        self._not_finite: set[tuple[str, int]] = set()  # projection, expert: of all rows, not only those that are coded
        self._exact = {(p, i): _ExactBytes(groups[p]) for p in groups for i in self._labels} if exact_bytes else {}
        inner, hidden = groups["up"].shape
        tokens, neurons = self._fitting(states, inner, rows) if states is not None else (0, rows)
        name = layer_name(groups["up"])
        self._neurons = Sample(seed, f"{name}/neurons", inner, neurons, hidden)
        self._places = Sample(seed, f"{name}/places", hidden, rows, inner)
        self._bases: list[Ffn] = []  # one for all experts, or each its own
        self._experts: dict[int, ChangedFfn] = {}
        if states is not None and "down" in groups:
            self._prepare(states, tokens, inner, activation)

    def _check(self, codec: DeltaCodec, shape: tuple[int, int]) -> None:
        if codec.block_rows(shape) is not None:
            raise UsageError(
                f"{codec.term}: expected a codec whose rows encode apart; it takes whole matrices in memory"
            )

    def _fitting(self, states: States, inner: int, rows: int) -> tuple[int, int]:
        """Tokens and sampled neurons that HELD_BYTES allow; n neurons take 4 (2 codecs T n + n^2) bytes of each expert."""
        given = len(states) if isinstance(states, np.ndarray) else max(map(len, states.values()), default=0)
        each = HELD_BYTES / 4 / max(1, len(self._labels))
        tokens = min(given, max(LEAST_TOKENS, int(each / inner)))
        half = len(self._sampled) * tokens
        return tokens, min(rows, max(LEAST_NEURONS, int(math.sqrt(half * half + each) - half)))

    def _prepare(self, states: States, tokens: int, inner: int, activation: str) -> None:
        hidden, gate, shared = self._groups["up"].shape[1], "gate" in self._groups, isinstance(states, np.ndarray)
        for i, label in self._labels.items():
            given = states if shared else states.get(label, np.empty((0, hidden), np.float32))
            own = given[:tokens].T
            if not shared or not self._bases:
                self._bases.append(Ffn(own, inner, gate, activation))
            ffn = Ffn(own, inner, gate, activation)
            self._experts[i] = ChangedFfn(
                ffn, [p for p in self._groups if p != "down"], len(self._sampled), self._neurons
            )

    def add(self, block: Block) -> None:
        """The next rows of all experts."""
        projection, rows = block.group.projection, block.rows
        with np.errstate(all="ignore"):  # what is not finite comes out as NaN
            self._multiply(block)
            for i in self._labels:
                self._look(block, i)
                for places, differences in self._coded(block, i):
                    if i in self._experts:
                        self._experts[i].change(projection, places, differences)
                if i in self._experts:
                    self._experts[i].settle(projection, rows)
                if self._exact:
                    self._exact[projection, i].add(block.experts[i], block.base)

    def _look(self, block: Block, i: int) -> None:
        at = (block.group.projection, i)
        if at not in self._not_finite:
            delta = floats.delta(block.experts[i], block.base, block.group.dtype)
            if floats.first_nonfinite(delta) >= 0:
                self._not_finite.add(at)

    def _multiply(self, block: Block) -> None:
        if not self._experts:
            return
        projection, rows, dtype = block.group.projection, block.rows, block.group.dtype
        weight = floats.widen(block.base, dtype)
        products = [base.multiply(projection, rows, weight) for base in self._bases]
        for base, product in zip(self._bases, products, strict=True):
            base.settle(projection, rows, product)
        for number, (i, expert) in enumerate(self._experts.items()):
            weight = floats.widen(block.experts[i], dtype)
            expert.multiply(projection, rows, weight, products[number % len(products)])

    def _coded(self, block: Block, i: int) -> Iterator[tuple[slice, np.ndarray]]:
        """(places in the sample, fp32 [codecs, rows, in] W' - W) of the sampled rows of expert i, run by run."""
        projection, dtype = block.group.projection, block.group.dtype
        for rows, places in self._sample(projection).within(block.rows):
            here = slice(rows.start - block.rows.start, rows.stop - block.rows.start)
            expert, base = block.experts[i][here], block.base[here]
            differences = np.zeros((len(self._sampled), *expert.shape), np.float32)
            for number, codec in enumerate(self._sampled):
                try:
                    coded = self._code(codec, block, i, here)
                except NonFiniteError:
                    self._refused.add((projection, i, number))
                    continue
                self._differences[projection, i][number].add(expert, coded, base, dtype)
                differences[number] = floats.delta(coded, expert, dtype)
            yield places, differences

    def _code(self, codec: DeltaCodec, block: Block, i: int, rows: slice) -> np.ndarray:
        """Stored bits of some of a block's rows of expert i, encoded and decoded. Raises NonFiniteError."""
        expert, base, dtype, first = block.experts[i][rows], block.base[rows], block.group.dtype, block.rows.start
        key = make_key(self._seed, block.group.name, self._labels[i])
        parts = codec.encode_expert(expert, base, dtype, key, first + rows.start)
        return codec.decode_expert(parts, base, dtype, key, first + rows.start)

    def _sample(self, projection: str) -> Sample:
        return self._places if projection == "down" else self._neurons

    def finite(self, projection: str, label: str) -> bool:
        """Whether all of an expert's matrix, and of its difference from the base, is finite: a lossy codec refuses any other."""
        return all(p != projection or self._labels[i] != label for p, i in self._not_finite)

    def base_errors(self) -> dict[str, float]:
        """label -> |y_base - y| / |y|: what is lost with the base in the expert's place, as `none` has it; not sampled."""
        return {label: self._base_error(i) for i, label in self._labels.items()}

    def _base_error(self, i: int) -> float:
        return self._experts[i].base_error() if i in self._experts else math.nan

    def found(self) -> dict[str, dict[str, dict[str, Predicted]]]:
        """projection -> label -> codec.term -> Predicted."""
        return {p: {label: self._of_matrix(p, i) for i, label in self._labels.items()} for p in self._groups}

    def _of_matrix(self, projection: str, i: int) -> dict[str, Predicted]:
        shape, expert, found = self._groups[projection].shape, self._experts.get(i), {}
        energies = expert.energies(projection) * self._sample(projection).scale if expert else None
        numbers = iter(range(len(self._sampled)))
        for codec in self._codecs:
            size = sum(spec.nbytes for spec in codec.spec(shape).values() if spec)
            if codec.lossless:
                exact = self._exact.get((projection, i))
                found[codec.term] = Predicted(size + exact.found if exact else None, 0.0, 0.0, 1.0, 0.0, 0.0)
                continue
            number = next(numbers)
            if (projection, i) in self._not_finite or (projection, i, number) in self._refused:
                found[codec.term] = Predicted(size, *[math.nan] * 5)
                continue
            weights = self._weight_errors(projection, i, number)
            outputs = (math.nan, math.nan) if expert is None else expert.errors(energies[number])
            found[codec.term] = Predicted(size, *weights, *outputs)
        return found

    def _weight_errors(self, projection: str, i: int, number: int) -> tuple[float, float, float]:
        differences = self._differences[projection, i][number]
        if not differences.finite:
            return math.nan, math.nan, math.nan
        errors = differences.errors()
        return errors["weight"], errors["delta"], errors["kept"]


class _ExactBytes:
    """Bytes of one matrix's `exact` stream, coded in chunks of its own rows however the blocks came."""

    def __init__(self, group: ExpertGroup):
        self._codec, self._dtype, self._left = ExactCodec(), group.dtype, group.shape[0]
        self._chunk = self._codec.block_rows(group.shape)
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self.found = 0

    def add(self, expert: np.ndarray, base: np.ndarray) -> None:
        """Stored bits [rows, in] of the next rows."""
        while expert.shape[0]:
            wanted = min(self._chunk, self._left) - sum(part.shape[0] for part, _ in self._held)
            self._held.append((expert[:wanted], base[:wanted]))
            if expert.shape[0] < wanted:
                return
            whole, its_base = (np.concatenate(parts) for parts in zip(*self._held, strict=True))
            self.found += self._codec.encode_expert(whole, its_base, self._dtype, 0, 0)["stream"].nbytes
            self._left -= whole.shape[0]
            self._held.clear()
            expert, base = expert[wanted:], base[wanted:]
