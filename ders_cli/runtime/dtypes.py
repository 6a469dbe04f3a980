"""Names of stored dtypes, torch's dtypes, and bits as numpy sees them."""

import numpy as np
import torch
from torch import Tensor

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "I64": torch.int64,
}
NAME = {dtype: name for name, dtype in TORCH.items()}
_BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


def bits_of(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor (bf16 and fp16 as uint16, fp32 as uint32, integers as they are); no copy on the CPU.

    By DLPack: after Tensor.numpy() a storage cannot be resized, and so FSDP could not free it.
    """
    tensor = tensor.detach().cpu().contiguous()
    return np.from_dlpack(tensor.view(_BITS.get(tensor.dtype, tensor.dtype)))


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The inverse of `bits_of`, without a copy."""
    return torch.from_numpy(bits).view(dtype)
