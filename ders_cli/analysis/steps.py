"""The difference from the base counted in steps of the dtype: its entropy, and what the exact codec would take.

An optimiser's steps are about equally large everywhere, so counted in steps of the format they halve with each exponent of
the base; `exact` codes each weight's count in that context (ders_kernels/exact_format.py, docs/format.md section 5). Counting
the same tokens, chunk by chunk of the codec's own rows, tells its size without coding anything.
"""

from dataclasses import dataclass

import numpy as np
from ders_kernels import exact_format
from ders_kernels.cpu_ops import steps

from ..checkpoint.tensor import STORAGE
from ..codecs.exact import EXPONENT_SHIFT, ExactCodec
from ..layouts import ExpertGroup
from .blocks import Block

EXTENT_BYTES = 16  # of a chunk: where it begins and ends in the stream
EVERY = 8  # of the rows of a base that is only compared, one in so many is counted,
LEAST = 1 << 17  # unless that would leave fewer weights of a matrix


@dataclass(frozen=True)
class StepsFound:
    """Of one expert's matrix: the share of weights whose bits are the base's; the entropy in bits a weight of the difference
    in steps, given the base's exponent; the bytes that `exact` would take, extents included; whether all bits are the first
    expert's.
    """

    equal: float
    entropy: float
    bytes: int
    copied: bool


class Steps:
    """An observer: every expert against the chosen base (label ""), and, on sampled rows, against the other bases."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}  # by base, of the group under way
        self._found: dict[tuple[str, str], list[StepsFound]] = {}

    def add(self, block: Block) -> None:
        for label, base in {"": block.base, **block.others}.items():
            if block.rows.start == 0:
                self._groups[label] = _Group(block.group, _every(block.group) if label else 1)
            self._groups[label].add(block.rows, block.experts, base)
            if block.rows.stop == block.group.shape[0]:
                self._found[block.group.projection, label] = self._groups.pop(label).found()

    def found(self, projection: str, label: str = "") -> list[StepsFound]:
        """Of each expert, once all rows were seen."""
        return self._found[projection, label]


class _Expert:
    """One expert's counts in the chunk under way, and its sums over the finished ones."""

    def __init__(self, exponents: int, tokens: int):
        self.differences = np.zeros((2, exponents, tokens), np.uint32)
        self.exponents = np.zeros(
            (2, exponents), np.uint32
        )  # its own; of blocks that might better be coded without a base
        self.equal, self.bits, self.bytes, self.copied = 0, 0.0, 0, True


class _Group:
    """All experts of a group against one base; of the rows, one in `every` is counted."""

    def __init__(self, group: ExpertGroup, every: int):
        self._width, self._shift = 8 * STORAGE[group.dtype].itemsize, EXPONENT_SHIFT[group.dtype]
        self._raw_bits = exact_format.difference_tokens(self._width)
        self._shape, self._every, self._chunk = group.shape, every, ExactCodec().block_rows(group.shape)
        exponents = 1 << (self._width - 1 - self._shift)
        self.experts = [_Expert(exponents, self._raw_bits.size) for _ in group.members]
        self.weights = 0  # counted so far, of each expert

    def add(self, rows: slice, experts: list[np.ndarray], base: np.ndarray) -> None:
        """The next rows. A block may hold several chunks, or a part of one."""
        for expert, bits in zip(self.experts, experts, strict=True):
            expert.copied = expert.copied and np.array_equal(bits, experts[0])
        row = rows.start
        while row < rows.stop:
            begin = row // self._chunk * self._chunk
            end = min(rows.stop, begin + self._chunk)
            first = row + (begin - row) % self._every  # a chunk's first row is always counted
            counted = slice(first - rows.start, end - rows.start, self._every)
            there = np.ascontiguousarray(base[counted]).reshape(-1)
            for expert, bits in zip(self.experts, experts, strict=True):
                self._count(expert, np.ascontiguousarray(bits[counted]).reshape(-1), there)
            self.weights += there.size
            if end % self._chunk == 0 or end == self._shape[0]:
                self._finish(end)
            row = end

    def found(self) -> list[StepsFound]:
        """Of each expert, once all rows were added."""
        each = max(1, self.weights)
        return [StepsFound(e.equal / each, e.bits / each, e.bytes, e.copied) for e in self.experts]

    def _count(self, expert: _Expert, here: np.ndarray, there: np.ndarray) -> None:
        steps.count_differences(here, there, self._width - 1, self._shift, expert.differences)
        # without a base, sign and mantissa are raw bits: it cannot win below that
        if steps.conditional_bits(expert.differences, self._raw_bits) > expert.differences.sum() * (self._shift + 1):
            steps.count_exponents(here, self._shift, expert.exponents)

    def _finish(self, end: int) -> None:
        """The chunk that ends before row `end`."""
        weights = (end - (end - 1) // self._chunk * self._chunk) * self._shape[1]
        for expert in self.experts:
            counts, own = (a.sum(axis=0, dtype=np.int64) for a in (expert.differences, expert.exponents))
            expert.equal += int(counts[:, 0].sum())
            expert.bits += steps.conditional_bits(expert.differences, self._raw_bits)
            whole = np.rint(counts * (weights / counts.sum())).astype(np.int64)
            expert.bytes += EXTENT_BYTES + exact_format.expected_bytes(whole, own, self._shift, self._width)
            expert.differences[:], expert.exponents[:] = 0, 0


def _every(group: ExpertGroup) -> int:
    out, width = group.shape
    return max(1, min(EVERY, out * width // LEAST, ExactCodec().block_rows(group.shape)))
