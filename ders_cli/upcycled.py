"""A dense model read as the MoE that it becomes: a source of experts, all of which compute what its FFN computes.

Reading an expert reads the dense FFN, or a donor's; reading another tensor reads the dense model's, or makes the router. So
what writes and verifies conversions writes and verifies this one, and what it restores to is the stock MoE.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from ders_kernels.counter_rng import make_key
from ders_kernels.cpu_ops import floats

from .base import Base, ReadExpert, mean
from .blueprint import Upcycling, draw_blueprint
from .checkpoint.reader import CheckpointReader, read_view
from .checkpoint.tensor import FLOATS, STORAGE, TensorSpec
from .codecs import DeltaCodec
from .codecs.base import Parts
from .codecs.none import NoneCodec
from .codecs.rank import RankCodec
from .codecs.sparse import SparseCodec
from .donors import Adapter, FineTune, open_donor
from .errors import CheckpointError
from .layouts import ExpertGroup, MatrixView
from .plan import fill_shards, natural
from .routers import normal, start_router
from .source import Source
from .users import Users

NOISE_LABEL = "noise"
EXPONENTS = {"BF16": np.uint16(0x7F80), "F16": np.uint16(0x7C00), "F32": np.uint32(0x7F800000)}  # all set: not finite


class UpcycledSource(Source):
    """What the experts are stored as: `start`, a codec's initial parts, to be trained; `as_adapters`, the donors' own
    factors; or neither: their deltas are encoded. `fitted`, if it is set before anything is written: router rows fp32
    [experts, hidden] by layer ("model.layers.3").

    Raises what is wrong with the model, the donors or the settings, from headers alone.
    """

    shared = False

    def __init__(
        self,
        dense: Path | CheckpointReader,
        how: Upcycling,
        donors: list[Path],
        seed: int,
        max_shard_bytes: int,
        start: DeltaCodec | None = None,
        as_adapters: bool = False,
    ):
        self.how, self.seed, self.donors = how, seed, []
        self.fitted: dict[str, np.ndarray] | None = None
        self._start, self._as_adapters = start, as_adapters
        self.reader = dense if isinstance(dense, CheckpointReader) else CheckpointReader(dense)
        try:
            how.check()
            self.plan = draw_blueprint(self.reader, how)
            matrices = {view.tensor: view for views in self.plan.dense.values() for view in views.values()}
            self.donors = [open_donor(path, self.reader, matrices) for path in donors]
        except BaseException:
            self.close()
            raise
        layout = self.plan.layout
        self.folders = [self.reader.folder, *(donor.folder for donor in self.donors)]
        self.config, self.groups, self.copied = self.plan.config, self.plan.groups, self.plan.copied
        self.others = [
            name for name in self.copied if name in self.reader.tensors and name not in matrices
        ]  # outside FFNs
        self.guards, self.aliases, self.activation = layout.guards, dict(layout.aliases), layout.activation
        self.upcycling = asdict(how) | {"dense": self.reader.folder.resolve().name}
        self._form = self._make_form(max_shard_bytes)
        self._users = Users(self.groups, self.tensors_of)

    def check_unchanged(self) -> None:
        self.reader.check_unchanged()
        for donor in self.donors:
            donor.check_unchanged()

    def close(self) -> None:
        for donor in self.donors:
            if isinstance(donor, FineTune):
                donor.close()
        self.reader.close()

    def form(self) -> dict[str, Any]:
        return self._form

    def _make_form(self, max_shard_bytes: int) -> dict[str, Any]:
        names = sorted(self.plan.tensors, key=natural)
        shards = fill_shards([("copied", name, self.plan.tensors[name]) for name in names], max_shard_bytes)
        files = {
            shard.file: {
                "tensors": [[name, spec.dtype, list(spec.shape)] for name, spec in shard.fixed.items()],
                "metadata": {"format": "pt"},
            }
            for shard in shards
        }
        total = sum(spec.nbytes for spec in self.plan.tensors.values())
        return {
            "layout": self.plan.layout.name,
            "activation": self.activation,
            "aliases": self.aliases,
            "files": files,
            "index": {"metadata": {"total_size": total}} if len(shards) > 1 else None,
            "config": json.dumps(self.config, indent=2) + "\n",
        }

    def tensors_of(self, group: ExpertGroup) -> list[str]:
        return [self._dense_view(group).tensor]

    # --- experts ---

    def read(self, group: ExpertGroup, member: int, rows: slice) -> np.ndarray:
        copy, view = self._copy_of(group, member), self._dense_view(group)
        donor = self.donors[copy] if self.donors and group.layer in self.plan.chosen else None
        if isinstance(donor, FineTune):
            return self._scaled(group, donor.read(view, rows))
        bits = self.ancestor(group, rows)
        if isinstance(donor, Adapter) and (factors := self._factors(group, donor)):
            merged = floats.synthesize(bits, _product(factors[0][rows], factors[1], rows.start), group.dtype)
            return _finite(merged, group.dtype, rows.start, f"{donor.folder}: {view.tensor} with this adapter")
        return self._noisy(group, copy, bits, rows) if self.how.noise and group.layer in self.plan.chosen else bits

    def ancestor(self, group: ExpertGroup, rows: slice) -> np.ndarray:
        """Stored bits [rows, in] of the dense FFN, or of the slice of it that this group is. Raises CheckpointError at a NaN."""
        view = self._dense_view(group)
        bits = read_view(self.reader, view.tensor, view.offset, (view.row_stride, view.column_stride), view.shape, rows)
        scale = f", times --split {self.how.split}" if self.how.split > 1 and group.projection == "down" else ""
        return _finite(
            self._scaled(group, bits), group.dtype, rows.start, f"{self.reader.folder}: {view.tensor}{scale}"
        )

    def _copy_of(self, group: ExpertGroup, member: int) -> int:
        """Which of the dense FFN's copies an expert is (a slice of)."""
        return int(group.members[member][0]) // self.how.split

    def _slice(self, group: ExpertGroup) -> int:
        return int(group.members[0][0]) % self.how.split

    def _dense_view(self, group: ExpertGroup) -> MatrixView:
        view = next(views for (_, layer), views in self.plan.dense.items() if layer == group.layer)[group.projection]
        stride = view.column_stride if group.projection == "down" else view.row_stride
        inner = group.shape[1 if group.projection == "down" else 0]
        return replace(view, shape=group.shape, offset=view.offset + self._slice(group) * inner * stride)

    def _scaled(self, group: ExpertGroup, bits: np.ndarray) -> np.ndarray:
        if group.projection != "down" or self.how.split == 1:
            return bits
        return floats.narrow(floats.widen(bits, group.dtype) * np.float32(self.how.split), group.dtype)

    def _noisy(self, group: ExpertGroup, copy: int, bits: np.ndarray, rows: slice) -> np.ndarray:
        """The dense rows plus normal noise, `noise` times as large as the row's root mean square."""
        weights = floats.widen(bits, group.dtype)
        size = np.sqrt(np.mean(weights.astype(np.float64) ** 2, axis=1, keepdims=True)) * self.how.noise
        key = make_key(self.seed, group.name, f"{NOISE_LABEL}/{copy}")
        drawn = normal(key, rows.start * group.shape[1], weights.size).reshape(weights.shape)
        return floats.narrow(weights + drawn * size.astype(np.float32), group.dtype)

    # --- what is stored without encoding: the start of a training, and adapters ---

    def codec_of(self, group: ExpertGroup) -> DeltaCodec | None:
        if group.layer not in self.plan.chosen:
            return NoneCodec()
        if isinstance(self._start, (RankCodec, SparseCodec)):
            return replace(self._start, dtype=group.dtype)
        if self._as_adapters:
            found = [self._factors(group, donor) for donor in self.donors]
            ranks = [pair[1].shape[0] for pair in found if pair]
            return RankCodec(max(ranks), "F32") if ranks else NoneCodec()
        return None

    def given(self, group: ExpertGroup, member: int, codec: DeltaCodec, key: int) -> Parts | None:
        if group.layer not in self.plan.chosen or isinstance(codec, NoneCodec):
            return None
        if self._start is not None:
            return codec.initial(group.shape, key)
        if not self._as_adapters:
            return None
        most = min(codec.rank, *group.shape)
        left = np.zeros((group.shape[0], most), np.float32)  # adapters of a lower rank are filled up with zeros
        right = np.zeros((most, group.shape[1]), np.float32)
        if factors := self._factors(group, self.donors[self._copy_of(group, member)]):
            rank = factors[1].shape[0]
            if rank <= most:
                left[:, :rank], right[:rank] = factors
            elif group.shape[0] == most:  # more rank than the matrix has: the delta itself, times the identity
                np.fill_diagonal(left, 1)
                right[:] = _product(*factors, 0)
            else:
                left[:] = _product(*factors, 0)
                np.fill_diagonal(right, 1)
        return {"left": left.view(np.uint32), "right": right.view(np.uint32)}

    def _factors(self, group: ExpertGroup, adapter: Adapter) -> tuple[np.ndarray, np.ndarray] | None:
        """fp32 left [out, r], right [r, in] of an adapter's delta for one matrix, or for the slice of it that is wanted."""
        factors = adapter.factors(self._dense_view(group).tensor)
        if factors is None:
            return None
        first, m = self._slice(group), self.how.split
        if group.projection == "down":
            columns = slice(first * group.shape[1], (first + 1) * group.shape[1])
            return factors.left * np.float32(m), np.ascontiguousarray(factors.right[:, columns])
        return factors.left[first * group.shape[0] : (first + 1) * group.shape[0]], factors.right

    # --- all other tensors ---

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        spec = self.copied[name]
        if name in self.plan.made:
            yield self._made(name, spec).reshape(-1).view(np.uint8)
        elif self.how.average and spec.dtype in FLOATS and name in self.others:
            for pieces in zip(*(donor.reader.chunks(name) for donor in self.donors), strict=True):
                yield mean([piece.view(STORAGE[spec.dtype]) for piece in pieces], spec.dtype).view(np.uint8)
        else:
            yield from self.reader.chunks(name)

    def _made(self, name: str, spec: TensorSpec) -> np.ndarray:
        """Stored bits of a tensor that the dense model does not have: a router, or zeros."""
        if not name.endswith(f".{self.plan.pair.router}"):
            return np.zeros(spec.shape, STORAGE[spec.dtype])
        if self.fitted is not None:
            rows = self.fitted[name.removesuffix(f".{self.plan.pair.router}")]
        else:
            rows = start_router(
                self.how.router, self.config, self.seed, name, spec.shape[0] // self.how.split, spec.shape[1]
            )
        return _finite(floats.narrow(np.repeat(rows, self.how.split, axis=0), spec.dtype), spec.dtype, 0, name)


def _finite(bits: np.ndarray, dtype: str, first_row: int, what: str) -> np.ndarray:
    """The bits as they are. Raises CheckpointError if one of them is a NaN or an infinity."""
    exponent = EXPONENTS[dtype]
    if (bad := (bits & exponent) == exponent).any():
        row, column = (int(n) for n in np.argwhere(bad)[0])
        value = floats.widen(bits[row, column : column + 1], dtype)[0]
        raise CheckpointError(f"{what}: expected finite {dtype}, found {value} at [{first_row + row}, {column}]")
    return bits


def _product(left: np.ndarray, right: np.ndarray, row: int) -> np.ndarray:
    """fp32 left [rows, r] @ right [r, in], summed as the codec `rank` sums it."""
    parts = {"left": np.ascontiguousarray(left).view(np.uint32), "right": np.ascontiguousarray(right).view(np.uint32)}
    return RankCodec(right.shape[0], "F32").decode(parts, (left.shape[0], right.shape[1]), 0, row)


class AncestorBase(Base):
    """The dense FFN that the experts were copied from; with `split`, the slice of it that a group is."""

    def __init__(self, source: UpcycledSource):
        self.label, self._source = f"dense:{source.reader.folder.resolve().name}", source

    def rows(self, group: ExpertGroup, rows: slice, read: ReadExpert) -> np.ndarray:
        return self._source.ancestor(group, rows)
