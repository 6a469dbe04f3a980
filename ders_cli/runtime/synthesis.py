"""An expert's weight from the parameters' bits: the codec's own decoding, in blocks of rows, on all of torch's threads.

The bits are those of `ders restore` where parameters are in memory as they are on disk. Where the base is in memory in
fp32, the weight is fp32(base) + D, not rounded. On a device that isn't the CPU: decoded here and moved.
"""

from collections.abc import Mapping

import numpy as np
import torch
from ders_kernels.cpu_ops.threads import share
from torch import Tensor

from ..codecs import DeltaCodec
from ..codecs.base import Parts
from ..errors import CheckpointError, UnsupportedError
from ..source import BLOCK_WEIGHTS
from .dtypes import NAME, TORCH, bits_of
from .group import RuntimeGroup


def synthesize(group: RuntimeGroup, base: Tensor, pieces: Mapping[str, Tensor], member: int) -> Tensor:
    """Base [out, in] and one member's parts -> its weight [out, in] in the base's dtype, on the base's device.

    Raises CheckpointError on parts that contradict themselves, UnsupportedError if exact deltas meet a narrowed base.
    """
    if group.codec.lossless:
        bits, dtype = bits_of(_in_stored_dtype(group, base)), group.dtype
    else:
        bits, dtype = bits_of(base), NAME[base.dtype]
    # torch's memory starts at a multiple of 64 bytes, numpy's doesn't, and products with it take a tenth more time
    weight = torch.empty(group.shape, dtype=TORCH[dtype])
    _decode(group, bits, dtype, own_parts(group, pieces), member, bits_of(weight))
    return weight.to(device=base.device, dtype=base.dtype)


def decode_delta(group: RuntimeGroup, pieces: Mapping[str, Tensor], member: int) -> np.ndarray:
    """One member's parts -> D fp32 [out, in]. Not for `exact`, which has none."""
    change = np.zeros(group.shape, np.uint32)  # its own base
    _decode(group, change, "F32", own_parts(group, pieces), member, change)
    return change.view(np.float32)


def own_parts(group: RuntimeGroup, pieces: Mapping[str, Tensor]) -> Parts:
    """One member's parts in their stored form."""
    return {part: bits_of(piece.to(TORCH[group.parts[f"delta.{part}"].dtype])) for part, piece in pieces.items()}


def _decode(group: RuntimeGroup, base: np.ndarray, dtype: str, own: Parts, member: int, out: np.ndarray) -> None:
    """Base's bits [out, in] -> the expert's, written to `out`, which may be the base."""
    codec, (_, width) = group.codec, group.shape
    together = codec.block_rows(group.shape) if codec.lossless else None
    step = together or max(1, BLOCK_WEIGHTS // max(1, width))

    def some(begin: int, end: int) -> None:
        for block in range(begin, end):
            rows = slice(block * step, min((block + 1) * step, out.shape[0]))
            parts = _rows(codec, group.shape, own, rows)
            out[rows] = codec.decode_expert(parts, base[rows], dtype, group.keys[member], rows.start)

    try:
        share(some, -(-out.shape[0] // step))
    except CheckpointError as error:
        raise CheckpointError(f"{group.name}, expert {group.experts[member]}: {error}") from None


def _in_stored_dtype(group: RuntimeGroup, base: Tensor) -> Tensor:
    """`exact` counts in steps from the stored bits, so the base must still have them all."""
    stored = TORCH[group.dtype]
    if torch.promote_types(base.dtype, stored) != base.dtype:
        raise UnsupportedError(
            f"{group.name}.base: its exact deltas need it in {stored} or wider, found {base.dtype}; "
            "load it as stored (dtype='auto'), or dequantised"
        )
    return base.to(stored)


def _rows(codec: DeltaCodec, shape: tuple[int, int], own: Parts, rows: slice) -> Parts:
    """The parts of some rows; of a stream the chunk that these rows are."""
    if not codec.lossless:
        return {part: data if part in codec.whole else data[rows] for part, data in own.items()}
    begin, end = (int(n) for n in own["extents"][rows.start // codec.block_rows(shape)])
    if not 0 <= begin <= end <= own["stream"].size:
        raise CheckpointError(f"extents {begin}..{end} lie outside a stream of {own['stream'].size} bytes")
    return {"stream": own["stream"][begin:end]}
