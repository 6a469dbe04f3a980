"""Few kept entries: x @ D.T as a product with a sparse matrix (CSR, fp32, int32 columns); torch's takes no bf16.

With the columns 8 bytes are read for an entry: at [5632, 2048] on two cores a product with an eighth of the entries costs what
the bf16 matrix does at 16 tokens, and reads half of that matrix's bytes. So this is for no more than DENSITY.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..counter_rng import draw
from ..deltas import Bitmap, Drawn, Kept
from ..packing import unpack_positions
from . import select
from .threads import share

DENSITY = 1 / 8
BLOCK = 1 << 18  # entries of a matrix whose positions are unpacked in one call


class Positions(NamedTuple):
    """Row r's entries are those from starts[r] to starts[r + 1]: int32 [out + 1], int32 [entries]."""

    starts: Tensor
    columns: Tensor


def columns(kept: Kept, expert: int, first: int, last: int) -> np.ndarray:
    """Rows first..last-1: int32 [rows, k], ascending; column `in` is none. Raises ValueError on bits that are no such set."""
    positions, (_, _, width) = kept.positions, kept.shape
    if isinstance(positions, Drawn):
        found, key = np.empty((last - first, kept.kept), np.int32), positions.keys[expert]
        select.largest(draw(key, first * width, found.shape[0] * width).reshape(-1, width), found)
        return found
    if isinstance(positions, Bitmap):
        parts = {"bitmap": positions.bits}
    else:
        parts = {"high": positions.high} | ({} if positions.low is None else {"low": positions.low})
    own = {name: part[expert, first:last].detach().cpu().contiguous().numpy() for name, part in parts.items()}
    return unpack_positions(own, kept.kept, width, unused="high" in own, first_row=first)


def positions(kept: Kept, expert: int) -> tuple[Positions, Tensor | None]:
    """Those of one expert, and which of the slots they are (bool [out, k]) where some are unused, else None."""
    (_, out, width), k = kept.shape, kept.kept
    found = np.empty((out, k), np.int32)
    step = max(1, BLOCK // max(1, width))

    def some(first: int, last: int) -> None:
        for row in range(first, last, step):
            found[row : min(row + step, last)] = columns(kept, expert, row, min(row + step, last))

    share(some, out)
    used = torch.from_numpy(found != width)
    if used.all():
        starts = torch.arange(out + 1, dtype=torch.int32) * k
        return Positions(starts, torch.from_numpy(found.reshape(-1))), None
    starts = torch.nn.functional.pad(used.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return Positions(starts, torch.from_numpy(found)[used]), used


def matrix(at: Positions, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """CSR fp32 [out, in] of values [entries]."""
    with warnings.catch_warnings():  # "beta state", and that invariants aren't checked: ours hold
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(at.starts, at.columns, values.float(), shape)


def product(x: Tensor, sparse: Tensor) -> Tensor:
    """[T, in], CSR [out, in] -> [T, out] in x's dtype; sums are fp32."""
    return (sparse @ x.float().T).T.to(x.dtype, memory_format=torch.contiguous_format)
