"""A model whose experts' neurons stand in another order, read as if they stood in one; and the way back.

An order says of each place which neuron of the original stands there: row k of an aligned gate or up is row order[k] of
the original's, column k of down its column order[k]. The FFN computes the same, so a DeRS checkpoint of aligned experts runs
as any other. Only who wants the original's files needs the orders: they are kept as copied tensors, one for a layer,

    model.layers.3.mlp.experts.order    I32 [E, inner]

named in ders.json under `aligned` (docs/format.md, section 7). alignment.py finds them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .base import MEAN_BYTES
from .checkpoint.tensor import STORAGE, TensorSpec
from .errors import CheckpointError, UnsupportedError, UsageError
from .layouts import ExpertGroup, MatrixView
from .source import DersSource, PlainSource, Source

Orders = dict[str, dict[str, np.ndarray]]  # layer -> label of an expert -> int32 [inner]; what is not there is in order
ORDER = ".order"
# A row of the file is read on its own where that saves reading this much of its matrix: a read costs what copying 16 kB does
READ_BYTES = 16 << 10


def layer_of(group: ExpertGroup) -> str:
    """model.layers.3.mlp.experts, of model.layers.3.mlp.experts.gate_proj."""
    return group.name.rpartition(".")[0]


def is_identity(order: np.ndarray) -> bool:
    return bool((order == np.arange(order.size)).all())


class AlignedSource(Source):
    """A plain checkpoint's experts, their neurons in other orders; the orders are tensors beside those that it copies."""

    def __init__(self, source: PlainSource, orders: Orders):
        self.reader, self.folders, self.config, self.groups = (
            source.reader,
            source.folders,
            source.config,
            source.groups,
        )
        self.guards, self.aliases, self.activation = source.guards, source.aliases, source.activation
        self.shared, self.upcycling, self._users = source.shared, source.upcycling, source._users
        self._source, self.orders = source, orders
        self._tables = {f"{layer}{ORDER}": table for layer, table in _tables(source, orders).items()}
        for name in self._tables:
            if name in self.reader.tensors:
                raise UnsupportedError(
                    f"{name}: the source has a tensor of the name that --align would give; leave it out"
                )
        self.aligned = tuple(self._tables)
        self.copied = source.copied | {name: TensorSpec(table.shape, "I32") for name, table in self._tables.items()}

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        if name in self._tables:
            return iter([self._tables[name].reshape(-1).view(np.uint8)])
        return self._source.chunks(name)

    def form(self) -> dict[str, Any]:
        return self._source.form()

    def tensors_of(self, group: ExpertGroup) -> list[str]:
        return self._source.tensors_of(group)

    def order(self, group: ExpertGroup, label: str) -> np.ndarray:
        """int32 [inner]: place -> neuron of the original, of an expert."""
        found = self.orders.get(layer_of(group), {}).get(label)
        return (
            np.arange(group.shape[1 if group.projection == "down" else 0], dtype=np.int32) if found is None else found
        )

    def read(self, group: ExpertGroup, member: int, rows: slice) -> np.ndarray:
        label = group.members[member][0]
        if label not in self.orders.get(layer_of(group), {}):
            return self._source.read(group, member, rows)
        return self.read_in(group, member, rows, self.order(group, label))

    def read_in(self, group: ExpertGroup, member: int, rows: slice, order: np.ndarray) -> np.ndarray:
        """Stored bits [rows, in] of an expert, its neurons in this order."""
        if group.projection == "down":
            return self._source.read(group, member, rows).take(order, axis=1)
        view, wanted = group.members[member][1], order[rows]
        row_bytes = view.shape[1] * STORAGE[group.dtype].itemsize
        if view.column_stride != 1:
            return self._read_columns(view, group.dtype, wanted)
        if wanted.size * READ_BYTES >= view.shape[0] * row_bytes:
            return self._source.read(group, member, slice(0, view.shape[0]))[wanted]
        if rows.start == 0:
            self._read_through(view, group.dtype)
        return self._read_rows(view, group.dtype, wanted)

    def chunk_rows(self, group: ExpertGroup) -> int | None:
        """Of matrices that the file has transposed all is read, whatever rows are wanted: as many rows of all experts as fit
        MEAN_BYTES, with the two copies that reading one makes."""
        moved = self.orders.get(layer_of(group), {})
        if group.projection == "down" or all(v.column_stride == 1 for label, v in group.members if label in moved):
            return None
        row_bytes = group.shape[1] * STORAGE[group.dtype].itemsize
        return max(1, min(group.shape[0], MEAN_BYTES // (row_bytes * (len(group.members) + 2))))

    def _read_columns(self, view: MatrixView, dtype: str, wanted: np.ndarray) -> np.ndarray:
        """Rows of a transposed matrix: each input column is read as a whole, and what is wanted of it kept."""
        out = np.empty((view.shape[1], wanted.size), STORAGE[dtype])
        column, places = np.empty((view.shape[0] - 1) * view.row_stride + 1, out.dtype), wanted * view.row_stride
        for number, line in enumerate(out):
            self.reader.read_bytes(view.tensor, (view.offset + number * view.column_stride) * out.itemsize, column)
            line[:] = column[places]
        return np.ascontiguousarray(out.T)

    def _read_through(self, view: MatrixView, dtype: str) -> None:
        """Read a matrix from front to back, for the kernel's cache: single rows would come from a disk one by one."""
        size = STORAGE[dtype].itemsize
        end = view.offset + (view.shape[0] - 1) * view.row_stride + view.shape[1]
        for _ in self.reader.chunks(view.tensor, view.offset * size, end * size):
            pass

    def _read_rows(self, view: MatrixView, dtype: str, wanted: np.ndarray) -> np.ndarray:
        out = np.empty((wanted.size, view.shape[1]), STORAGE[dtype])
        for line, row in zip(out, wanted.tolist(), strict=True):
            self.reader.read_bytes(view.tensor, (view.offset + row * view.row_stride) * out.itemsize, line)
        return out

    def close(self) -> None:
        self._source.close()


def _tables(source: Source, orders: Orders) -> dict[str, np.ndarray]:
    """Layer -> int32 [E, inner], for layers of which an expert is out of order."""
    tables = {}
    for group in source.groups:
        layer = layer_of(group)
        if group.projection == "up" and orders.get(layer):
            own = [orders[layer].get(label, np.arange(group.shape[0])) for label, _ in group.members]
            tables[layer] = np.stack(own).astype("<i4")
    return tables


# --- the way back


def order_of(source: Source, group: ExpertGroup) -> np.ndarray | None:
    """int32 [E, inner], a row for each member: in which order its neurons stand; None: in the original's.

    Raises CheckpointError unless each row has every neuron once.
    """
    name = f"{layer_of(group)}{ORDER}"
    if not isinstance(source, DersSource) or name not in source.aligned:
        return None
    inner = group.shape[1 if group.projection == "down" else 0]
    expected, found = TensorSpec((len(group.members), inner), "I32"), source.copied.get(name)
    if found != expected:
        said = f"{found.dtype} {list(found.shape)}" if found else "no such tensor"
        raise CheckpointError(f"{name}: expected I32 {list(expected.shape)} for {group.name}, found {said}")
    table = source.reader.read(name)
    for (label, _), order in zip(group.members, table, strict=True):
        if not is_identity(np.sort(order)):
            raise CheckpointError(
                f"{name}, expert {label}: expected each of its {inner} neurons once, found another list"
            )
    return table


def orders_of(source: Source) -> Orders:
    """Every order of a source that is not the original's, checked. Raises CheckpointError."""
    if isinstance(source, AlignedSource):
        return source.orders
    layers = {f"{layer_of(group)}{ORDER}" for group in source.groups}
    for name, times in Counter(source.aligned).items():
        if name not in layers:
            raise CheckpointError(f"ders.json: aligned: {name:.200}: expected LAYER{ORDER} of a layer with experts")
        if times > 1:
            raise CheckpointError(f"ders.json: aligned: {name}: {times} times; expected once")
    orders: Orders = {}
    for group in source.groups:
        table = order_of(source, group)
        if table is not None:
            own = zip(group.members, table, strict=True)
            orders[layer_of(group)] = {label: order for (label, _), order in own if not is_identity(order)}
    return {layer: own for layer, own in orders.items() if own}


def original_place(source: Source, group: ExpertGroup, member: int, row: int, column: int) -> tuple[int, int]:
    """Where the original has the element [row, column] of an expert."""
    if isinstance(source, AlignedSource):
        order = source.order(group, group.members[member][0])
    elif (table := order_of(source, group)) is not None:
        order = table[member]
    else:
        return row, column
    return (row, int(order[column])) if group.projection == "down" else (int(order[row]), column)


def put_back(original: np.ndarray, projection: str, order: np.ndarray, rows: slice, block: np.ndarray) -> None:
    """Put rows of an aligned matrix where they stood: block [rows, in] into `original` [out, in]."""
    if projection == "down":
        original[rows, order] = block
    else:
        original[order[rows]] = block


def in_one_order(tested: Source, reference: Source) -> tuple[Source, Source]:
    """Two checkpoints of one model, to be compared: a plain one is read in the order of the other.

    Raises UsageError where both are DeRS checkpoints in different orders.
    """
    mine, theirs = orders_of(tested), orders_of(reference)
    if _equal(mine, theirs):
        return tested, reference
    if isinstance(reference, PlainSource):
        return tested, AlignedSource(reference, mine)
    if isinstance(tested, PlainSource):
        return AlignedSource(tested, theirs), reference
    raise UsageError(
        f"{tested.reader.address} and {reference.reader.address}: their experts' neurons stand in different orders (--align); "
        "`ders restore` one of them, or compare each with the original model"
    )


def _equal(mine: Mapping[str, Mapping[str, np.ndarray]], theirs: Mapping[str, Mapping[str, np.ndarray]]) -> bool:
    if mine.keys() != theirs.keys():
        return False
    return all(
        own.keys() == theirs[layer].keys() and all(np.array_equal(order, theirs[layer][e]) for e, order in own.items())
        for layer, own in mine.items()
    )
