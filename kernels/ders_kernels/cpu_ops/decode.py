"""D of some rows by the compiled kernels, and W = round(B + D): the bits of reference.decode and reference.synthesize."""

import numpy as np
import torch
from torch import Tensor

from ..deltas import Delta, Ints, Kept, LowRank, Sum
from . import floats, ints, lowrank, scattered, select

STORED = {
    torch.bfloat16: ("BF16", torch.uint16),
    torch.float16: ("F16", torch.uint16),
    torch.float32: ("F32", torch.uint32),
}


def bits_of(tensor: Tensor) -> np.ndarray:
    """bf16 and fp16 as uint16, fp32 as uint32; no copy of what is contiguous."""
    return tensor.detach().contiguous().view(STORED[tensor.dtype][1]).numpy()


def rows(delta: Delta, expert: int, first: int, last: int) -> np.ndarray:
    """fp32 [last - first, in]"""
    if isinstance(delta, Ints):
        out = np.empty((last - first, delta.width), np.float32)
        ints.decode(*_of_rows(delta, expert, first, last), delta.bits, delta.group, out)
        return out
    if isinstance(delta, Kept):
        coded = isinstance(delta.values, Ints)
        values = rows(delta.values, expert, first, last) if coded else _wide(delta.values[expert, first:last])
        out = np.empty((last - first, delta.width), np.float32)
        select.scatter(scattered.columns(delta, expert, first, last), values, out)
        return out
    if isinstance(delta, LowRank):
        out = np.zeros((last - first, delta.shape[2]), np.float32)
        lowrank.add_products(_wide(delta.left[expert, first:last]), _wide(delta.right[expert]), out)
        return out
    if isinstance(delta, Sum):
        return rows(delta.first, expert, first, last) + rows(delta.then, expert, first, last)
    raise TypeError(f"no kernel for {type(delta).__name__}")


def synthesize(base: Tensor, delta: Delta, expert: int, first: int, out: Tensor) -> None:
    """Some rows of the base, from `first` on, and their D -> round(B + D), written to out; both [rows, in] of one dtype."""
    last, kind = first + out.shape[0], STORED[base.dtype][0]
    if isinstance(delta, Ints) and kind == "BF16":
        codes, scale = _of_rows(delta, expert, first, last)
        ints.synthesize(codes, scale, delta.bits, delta.group, bits_of(base), bits_of(out))
    else:
        bits_of(out)[:] = floats.synthesize(bits_of(base), rows(delta, expert, first, last), kind)


def _of_rows(delta: Ints, expert: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """codes uint8, scales uint16"""
    codes = delta.codes[expert, first:last].detach().contiguous().numpy()
    return codes, bits_of(delta.scale[expert, first:last].to(torch.bfloat16))


def _wide(stored: Tensor) -> np.ndarray:
    return stored.detach().float().contiguous().numpy()
