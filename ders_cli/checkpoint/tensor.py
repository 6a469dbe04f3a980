"""What a stored tensor is, by its header alone: a shape, a dtype, and so a number of bytes.

Weights are handled as bit patterns: BF16 and F16 as uint16 arrays, F32 as uint32 arrays. Arithmetic is done in
fp32 after `ders_kernels.cpu_ops.floats.widen`; nothing is lost on the way in or out.
"""

import math
from dataclasses import dataclass

import numpy as np

# safetensors dtype -> numpy dtype that holds its bits (None: ders copies such a tensor but never looks inside)
STORAGE: dict[str, np.dtype | None] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<u2"),
    "F32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "BOOL": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": None,
    "F8_E4M3": None,
    "F8_E5M2": None,
    "F8_E4M3FNUZ": None,
    "F8_E5M2FNUZ": None,
    "F8_E8M0": None,
}
BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
FLOATS = ("BF16", "F16", "F32")  # the dtypes in which ders takes expert weights


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and safetensors dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * BITS[self.dtype] // 8
