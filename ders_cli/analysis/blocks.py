"""One streaming pass over a layer: every block of rows is read once, and shown to all observers.

A statistic is an observer: it sees all blocks of one MoE layer in a fixed order and keeps its sums. Each layer has
observers of its own, so layers may run in threads and nothing depends on their order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from ders_kernels.cpu_ops import floats

from ..base import MEAN_BYTES, Base
from ..checkpoint.tensor import TensorSpec
from ..layouts import ExpertGroup
from ..source import BLOCK_WEIGHTS, DersSource, Source, row_blocks

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class Block:
    """The same rows of all experts of a group, read once.

    experts: stored bits [rows, in], one per member, in the order of group.members.
    base: stored bits [rows, in] of the chosen base.
    others: stored bits [rows, in] of further bases that are compared, such as the dense model, by label.
    """

    group: ExpertGroup
    rows: slice
    experts: list[np.ndarray]
    base: np.ndarray
    others: dict[str, np.ndarray] = field(default_factory=dict)
    memory: "Memory" = field(default_factory=lambda: Memory(), repr=False)  # of this block and those before it
    _deltas: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def delta(self, i: int) -> np.ndarray:
        """fp32 [rows, in]: expert i minus the base. Made once; read-only, and gone with the next block: copy what is kept."""
        if i not in self._deltas:
            out = self.memory.array(i, self.base.shape)
            self._deltas[i] = floats.delta(self.experts[i], self.base, self.group.dtype, out)
        return self._deltas[i]


class Memory:
    """fp32 arrays that the blocks of a layer use one after another: memory that is given back and taken again is cleared
    page by page, which took twice as long as all inner products of four experts."""

    def __init__(self) -> None:
        self._held: dict[int, np.ndarray] = {}

    def array(self, number: int, shape: tuple[int, int]) -> np.ndarray:
        """fp32, of any content."""
        size = shape[0] * shape[1]
        if number not in self._held or self._held[number].size < size:
            self._held[number] = np.empty(size, np.float32)
        return self._held[number][:size].reshape(shape)


class Observer(Protocol):
    """Sees every block of one MoE layer in order: all of gate, then up, then down (no gate where there is none), rows ascending."""

    def add(self, block: Block) -> None: ...


def layers_of(source: Source) -> dict[str, dict[str, ExpertGroup]]:
    """{"model.layers.3.mlp.experts": {projection: group}}, in the source's order; each fine-grained slice is one of its own."""
    layers: dict[str, dict[str, ExpertGroup]] = {}
    for group in source.groups:
        layers.setdefault(group.name.rpartition(".")[0], {})[group.projection] = group
    return {name: {p: groups[p] for p in PROJECTIONS if p in groups} for name, groups in layers.items()}


def observe_layer(
    source: Source,
    base: Base | None,
    groups: Mapping[str, ExpertGroup],
    observers: Sequence[Observer],
    advance: Callable[[int], None],
    others: Mapping[str, Base] | None = None,
) -> None:
    """Show every block of a layer to every observer. `base` None: the source is a DeRS checkpoint that brings its own.

    `others`: bases that are compared beside it. `advance` is told the bytes of experts that are done.
    """
    memory = Memory()
    for projection in (p for p in PROJECTIONS if p in groups):
        group = groups[projection]
        for block in _blocks(source, base, group, others or {}, memory):
            for observer in observers:
                observer.add(block)
            advance(sum(expert.nbytes for expert in block.experts))
            del block  # before the next one is read
        source.done(group, range(len(group.members)))


def block_rows(group: ExpertGroup) -> int:
    """Rows of a block: about BLOCK_WEIGHTS of one expert, fewer where all experts' rows would not fit MEAN_BYTES."""
    row_bytes = TensorSpec((1, group.shape[1]), group.dtype).nbytes * len(group.members)
    return max(1, min(BLOCK_WEIGHTS // group.shape[1], MEAN_BYTES // row_bytes))


def _blocks(
    source: Source, base: Base | None, group: ExpertGroup, others: Mapping[str, Base], memory: Memory
) -> Iterator[Block]:
    for rows in _readable(source, group):
        experts, stored = _read(source, base, group, rows)
        for part in row_blocks((rows.stop - rows.start, group.shape[1]), block_rows(group)):
            here = slice(rows.start + part.start, rows.start + part.stop)
            cut = [expert[part] for expert in experts]
            read = partial(_held, cut)
            own = base.rows(group, here, read) if stored is None else stored[part]
            beside = {label: other.rows(group, here, read) for label, other in others.items()}
            yield Block(group, here, cut, own, beside, memory)
        del experts, cut, stored  # before the next rows are read


def _readable(source: Source, group: ExpertGroup) -> Iterator[slice]:
    """Rows that are read at once: chunks that are decoded together, all else as a block asks."""
    return source.blocks(group) if source.chunk_rows(group) else row_blocks(group.shape, block_rows(group))


def _read(
    source: Source, base: Base | None, group: ExpertGroup, rows: slice
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """The experts' stored bits, and those of the base where the source has one."""
    experts = list(source.read_experts(group, range(len(group.members)), rows))
    if base is not None:
        return experts, None
    assert isinstance(source, DersSource)
    return experts, source.read_base(group, rows)


def _held(experts: list[np.ndarray], i: int, rows: slice) -> np.ndarray:
    """What a base reads, of rows that are held."""
    return experts[i]
