"""Random packed deltas of any size at once: right shapes, dtypes and valid positions, not encoded from a delta.

Codes are random bytes, scales and values small bf16. Positions can't be random bits: those of ROWS random rows are
encoded as the codec does it, and repeated for all rows and experts.
"""

import numpy as np
import torch
from ders_kernels.deltas import Delta, Ints, Kept, LowRank, Sum
from torch import Tensor

from .checkpoint.tensor import TensorSpec
from .codecs import DeltaCodec
from .runtime.deltas import packed_delta
from .runtime.dtypes import TORCH, from_bits

ROWS = 16
POSITIONS = ("low", "high", "bitmap")


def random_delta(codec: DeltaCodec, shape: tuple[int, int], experts: int, device: torch.device) -> Delta:
    """D_0 ... D_{experts-1}, [out, in] each, on the device."""
    specs = codec.spec(shape)
    positions = {}
    if any(name.rpartition(".")[2] in POSITIONS for name in specs):
        sample = np.random.default_rng(0).standard_normal((min(ROWS, shape[0]), shape[1])).astype(np.float32)
        positions = codec.encode(sample, 0, 0)
    parts = {}
    for name, spec in specs.items():
        if name.rpartition(".")[2] in POSITIONS:
            rows = from_bits(positions[name], TORCH[spec.dtype]).to(device)
            parts[name] = rows.repeat(-(-shape[0] // len(rows)), 1)[: shape[0]].repeat(experts, 1, 1)
        else:
            parts[name] = _random(name, spec, experts, device)
    return packed_delta(codec, parts, shape[1], tuple(range(1, experts + 1)))


def _random(name: str, spec: TensorSpec, experts: int, device: torch.device) -> Tensor:
    shape = (experts, *spec.shape)
    if spec.dtype == "U8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    values = torch.empty(shape, dtype=TORCH[spec.dtype], device=device)
    return values.uniform_(1e-4, 1e-3) if name.endswith("scale") else values.normal_(0, 1e-2)


def expert_bytes(delta: Delta) -> int:
    """Bytes that stand for one expert; drawn positions take none."""
    if isinstance(delta, Sum):
        return expert_bytes(delta.first) + expert_bytes(delta.then)
    if isinstance(delta, Kept):
        values = expert_bytes(delta.values) if isinstance(delta.values, Delta) else _of_one(delta.values)
        return values + sum(_of_one(part) for part in vars(delta.positions).values() if isinstance(part, Tensor))
    own = {Ints: ("codes", "scale"), LowRank: ("left", "right")}[type(delta)]
    return sum(_of_one(getattr(delta, name)) for name in own)


def _of_one(part: Tensor) -> int:
    return part.nbytes // part.shape[0]
