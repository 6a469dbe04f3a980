"""The shared base of a group: the mean of its experts, one of them, or the dense model that was upcycled.

The mean needs no second checkpoint and makes the deltas smallest (method: DeRS, arXiv 2503.01359, eq. 2, takes the
dense weight). It is summed in fp32 in expert order, times fp32(1 / E), and rounded once to the stored dtype. Deltas
are taken from the base as stored.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ders_kernels.cpu_ops import floats
from ders_kernels.cpu_ops.mean import mean as mean_bf16

from .checkpoint.reader import CheckpointReader, read_view
from .checkpoint.tensor import FLOATS
from .errors import CheckpointError, UnsupportedError, UsageError
from .layouts import ExpertGroup, MatrixView, find_dense
from .remote.address import is_remote, local_path
from .remote.reader import open_reader

MEAN_BYTES = 32 << 20  # most that the experts' rows may take while their mean is made

ReadExpert = Callable[[int, slice], np.ndarray]


class Base(ABC):
    """Where a group's base comes from."""

    label: str  # as ders.json says it
    folders: tuple[Path, ...] = ()  # what is read for it beside the experts

    @abstractmethod
    def rows(self, group: ExpertGroup, rows: slice, read: ReadExpert) -> np.ndarray:
        """Stored bits [rows, in] of the base; read(i, rows) gives those of expert i."""

    def check(self, group: ExpertGroup) -> None:  # noqa: B027 (nothing can be wrong with a mean)
        """Raise what `rows` would, from headers alone."""

    def check_unchanged(self) -> None:  # noqa: B027 (a mean has nothing open)
        """Raise DersError if a file that is read for it is not what it was when it was opened."""

    def close(self) -> None:  # noqa: B027
        """What was opened for it."""


def mean(experts: list[np.ndarray], dtype: str) -> np.ndarray:
    """Stored bits [E][rows, in] -> stored bits of their mean."""
    if dtype == "BF16" and (found := mean_bf16(experts)) is not None:
        return found
    total = floats.widen(experts[0], dtype).copy()
    with np.errstate(invalid="ignore", over="ignore"):
        for expert in experts[1:]:
            total += floats.widen(expert, dtype)
        total *= np.float32(1 / len(experts))
    return floats.narrow(total, dtype)


class MeanBase(Base):
    label = "mean"

    def rows(self, group: ExpertGroup, rows: slice, read: ReadExpert) -> np.ndarray:
        return mean([read(i, rows) for i in range(len(group.members))], group.dtype)


class ExpertBase(Base):
    """One expert of the group, by its number."""

    def __init__(self, number: int):
        self.label, self._member = f"expert:{number}", str(number)

    def _index(self, group: ExpertGroup) -> int:
        labels = [label for label, _ in group.members]
        if self._member not in labels:
            raise UsageError(f"base {self.label}: {group.name} has experts {labels[0]} ... {labels[-1]}")
        return labels.index(self._member)

    def check(self, group: ExpertGroup) -> None:
        self._index(group)

    def rows(self, group: ExpertGroup, rows: slice, read: ReadExpert) -> np.ndarray:
        return read(self._index(group), rows)


class DenseBase(Base):
    """The dense checkpoint's FFN; where its dtype differs it is rounded to the experts'."""

    def __init__(self, reader: CheckpointReader):
        self.folder, self.address, self._reader = reader.folder, reader.address, reader
        self.folders = (reader.folder,)
        self.label = f"dense:{self.folder.resolve().name}"

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def close(self) -> None:
        self._reader.close()

    def _view(self, group: ExpertGroup) -> MatrixView:
        view = find_dense(group, self._reader.tensors, self._reader.config)
        if (dtype := self._reader.tensors[view.tensor].dtype) not in FLOATS:
            raise UnsupportedError(f"{self._reader.folder}: {view.tensor}: dtype {dtype}; expected {', '.join(FLOATS)}")
        return view

    def check(self, group: ExpertGroup) -> None:
        self._view(group)

    def rows(self, group: ExpertGroup, rows: slice, read: ReadExpert) -> np.ndarray:
        view = self._view(group)
        bits = read_view(
            self._reader, view.tensor, view.offset, (view.row_stride, view.column_stride), view.shape, rows
        )
        if rows.stop == view.shape[0]:
            self._reader.done(view.tensor)
        dtype = self._reader.tensors[view.tensor].dtype
        return bits if dtype == group.dtype else floats.narrow(floats.widen(bits, dtype), group.dtype)


def make_base(text: str, scratch: Path | None = None) -> Base:
    """`mean`, `expert:N`, or the folder or address of a dense checkpoint; `scratch`: for what is fetched of it."""
    if text == "mean":
        return MeanBase()
    if text.startswith("expert:"):
        return ExpertBase(int(text[7:]))
    if not is_remote(text) and not local_path(text).is_dir():
        raise UsageError(f"base {text!r}: expected mean, expert:N or the folder of a dense model; no such folder")
    try:
        return DenseBase(open_reader(text, scratch))
    except CheckpointError as error:
        raise CheckpointError(f"base {text}: {error}") from None
