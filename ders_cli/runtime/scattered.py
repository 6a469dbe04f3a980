"""drop, top, N:M, sparse, ternary: x @ D.T as a product with a sparse matrix (ders_kernels.cpu_ops.scattered).

Columns are worked out once and kept; with the values in fp32 that is 8 bytes for each entry, so this is for few
entries. Values train (DeRS-SM, arXiv 2503.01359, 3.4): their gradient is <g[:, row], x[:, column]> for each entry,
sampled, so that memory doesn't grow with tokens times entries.
"""

import numpy as np
import torch
from ders_kernels.cpu_ops import decode, scattered
from ders_kernels.cpu_ops.scattered import DENSITY, Positions
from torch import Tensor

from ..codecs import DeltaCodec
from ..codecs.base import SelectiveCodec
from ..codecs.sparse import SparseCodec
from ..codecs.ternary import TernaryCodec
from .forms import Form, Pieces


def density(codec: DeltaCodec, shape: tuple[int, int]) -> float:
    """Share of entries that a codec of this file's keeps."""
    if isinstance(codec, SelectiveCodec):
        return codec.kept(shape[1]) / shape[1]
    return codec.density if isinstance(codec, TernaryCodec) else 1 - codec.rate


class Scattered(Form):
    """`values` train; ternary has none."""

    def __init__(self, codec: DeltaCodec):
        self.codec = codec
        self.trainable = frozenset() if isinstance(codec, TernaryCodec) else frozenset({"values"})

    @staticmethod
    def fits(codec: DeltaCodec) -> bool:
        return isinstance(codec, SelectiveCodec | SparseCodec | TernaryCodec)

    def runs(self, projection, x: Tensor, gradient: bool) -> bool:
        if x.device.type != "cpu" or (gradient and not self.trainable):
            return False
        return density(self.codec, projection.group.shape) <= DENSITY

    def product(self, projection, x: Tensor, member: int, pieces: Pieces | None) -> Tensor:
        starts, columns, values = self._matrix(projection, member, pieces or projection.piece(member))
        return _Product.apply(x, values, starts, columns, projection.group.shape[0])

    def delta(self, projection, member: int, pieces: Pieces) -> Tensor:
        starts, columns, values = self._matrix(projection, member, pieces)
        change = torch.zeros(projection.group.shape).index_put((_rows(starts), columns), values.float().cpu())
        return change.to(values.device)

    def gradients(self, projection, member: int, pieces: Pieces, g: Tensor) -> dict[str, Tensor]:
        starts, columns, _ = self._matrix(projection, member, pieces)
        flat = torch.zeros(pieces["values"].numel())
        flat[: columns.numel()] = g.cpu()[_rows(starts), columns]
        return {"values": flat.reshape(pieces["values"].shape).to(g.device)}

    def _matrix(self, projection, member: int, pieces: Pieces) -> tuple[Tensor, Tensor, Tensor]:
        """starts int32 [out + 1], columns int32 [n], values [n]: D as CSR."""
        if "values" not in self.trainable:
            return projection.made_once(member, lambda: _signed(projection, member))
        starts, columns = projection.made_once(member, lambda: self._positions(projection, member))
        return starts, columns, pieces["values"].reshape(-1)[: columns.numel()]

    def _positions(self, projection, member: int) -> Positions:
        if not isinstance(self.codec, SparseCodec):
            return scattered.positions(projection.packed(), member)[0]
        (out, width), key = projection.group.shape, projection.group.keys[member]
        flat = self.codec.flat_positions((out, width), key)
        starts = np.searchsorted(flat, np.arange(out + 1) * width)
        return Positions(torch.from_numpy(starts.astype(np.int32)), torch.from_numpy((flat % width).astype(np.int32)))


def _signed(projection, member: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of ternary: its slots may be unused."""
    kept = projection.packed()
    at, used = scattered.positions(kept, member)
    values = torch.from_numpy(decode.rows(kept.values, member, 0, projection.group.shape[0]))
    return *at, values.reshape(-1) if used is None else values[used]


def _rows(starts: Tensor) -> Tensor:
    """The row of every entry: int32 [n]."""
    return torch.repeat_interleave(torch.arange(starts.numel() - 1, dtype=torch.int32), starts.diff())


class _Product(torch.autograd.Function):
    """x [T, in] -> [T, out] in x's dtype, through fp32; gradients to x and to the values."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # it would narrow to what CSR products don't take
    def forward(ctx, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, out: int) -> Tensor:
        ctx.save_for_backward(x, values, starts, columns)
        return scattered.product(x, scattered.matrix(Positions(starts, columns), values, (out, x.shape[1])))

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, g: Tensor):
        x, values, starts, columns = ctx.saved_tensors
        at, g, shape, gx, gv = Positions(starts, columns), g.float(), (g.shape[1], x.shape[1]), None, None
        if ctx.needs_input_grad[0]:
            gx = (scattered.matrix(at, values, shape).t() @ g.T).T.to(x.dtype)
        if ctx.needs_input_grad[1]:
            pattern = scattered.matrix(at, torch.zeros(columns.numel()), shape)
            gv = torch.sparse.sampled_addmm(pattern, g.T.contiguous(), x.float()).values().to(values.dtype)
        return gx, gv, None, None, None
