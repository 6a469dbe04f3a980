"""drop, top, N:M, sparse, ternary: x @ D.T as a product with a sparse matrix (CSR, fp32, int32 columns).

Columns are worked out once and kept; with the values in fp32 that is 8 bytes for each entry, so this is for few
entries (DENSITY). torch's CSR product takes no bf16. Values train (DeRS-SM, arXiv 2503.01359, 3.4): their gradient is
<g[:, row], x[:, column]> for each entry, sampled, so that memory doesn't grow with tokens times entries.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from ..codecs import DeltaCodec
from ..codecs.base import SelectiveCodec
from ..codecs.sparse import SparseCodec
from ..codecs.ternary import TernaryCodec
from .forms import Form, Pieces
from .synthesis import decode_delta, over_rows, own_parts

# At [5632, 2048] on two cores a product with an eighth of the entries costs what the bf16 matrix does at 16 tokens, and
# its 8 bytes an entry are half of that matrix's bytes.
DENSITY = 1 / 8


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
            return projection.made_once(member, lambda: _nonzero(projection, member, pieces))
        starts, columns = projection.made_once(member, lambda: self._positions(projection, member, pieces))
        return starts, columns, pieces["values"].reshape(-1)[: columns.numel()]

    def _positions(self, projection, member: int, pieces: Pieces) -> tuple[Tensor, Tensor]:
        (out, width), key = projection.group.shape, projection.group.keys[member]
        if isinstance(self.codec, SparseCodec):
            flat = self.codec.flat_positions((out, width), key)
            starts = np.searchsorted(flat, np.arange(out + 1) * width)
            return torch.from_numpy(starts.astype(np.int32)), torch.from_numpy((flat % width).astype(np.int32))
        parts = own_parts(projection.group, {p: t for p, t in pieces.items() if p != "values"})
        columns = np.empty((out, self.codec.kept(width)), np.int32)

        def block(rows: slice) -> None:
            some = {part: data[rows] for part, data in parts.items()}
            columns[rows] = self.codec.columns(some, (rows.stop - rows.start, width), key, rows.start)

        over_rows(block, projection.group.shape)
        starts = torch.arange(out + 1, dtype=torch.int32) * columns.shape[1]
        return starts, torch.from_numpy(columns.reshape(-1))


def _nonzero(projection, member: int, pieces: Pieces) -> tuple[Tensor, Tensor, Tensor]:
    change = decode_delta(projection.group, pieces, member)
    row, column = np.nonzero(change)
    starts = np.searchsorted(row, np.arange(change.shape[0] + 1)).astype(np.int32)
    return torch.from_numpy(starts), torch.from_numpy(column.astype(np.int32)), torch.from_numpy(change[row, column])


def _rows(starts: Tensor) -> Tensor:
    """The row of every entry: int32 [n]."""
    return torch.repeat_interleave(torch.arange(starts.numel() - 1, dtype=torch.int32), starts.diff())


def _csr(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():  # "beta state", and that invariants aren't checked: ours hold
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(starts, columns, values.float(), shape)


class _Product(torch.autograd.Function):
    """x [T, in] -> [T, out] in x's dtype, through fp32; gradients to x and to the values."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # it would narrow to what CSR products don't take
    def forward(ctx, x: Tensor, values: Tensor, starts: Tensor, columns: Tensor, out: int) -> Tensor:
        ctx.save_for_backward(x, values, starts, columns)
        matrix = _csr(starts, columns, values, (out, x.shape[1]))
        return (matrix @ x.float().T).T.to(x.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, g: Tensor):
        x, values, starts, columns = ctx.saved_tensors
        g, shape, gx, gv = g.float(), (g.shape[1], x.shape[1]), None, None
        if ctx.needs_input_grad[0]:
            gx = (_csr(starts, columns, values, shape).t() @ g.T).T.to(x.dtype)
        if ctx.needs_input_grad[1]:
            pattern = _csr(starts, columns, torch.zeros(columns.numel()), shape)
            gv = torch.sparse.sampled_addmm(pattern, g.T.contiguous(), x.float()).values().to(values.dtype)
        return gx, gv, None, None, None
