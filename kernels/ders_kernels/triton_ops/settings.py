"""What kernels run on: an AMD or NVIDIA GPU, or Triton's interpreter, and what that can't do."""

import os

import torch
from torch import Tensor

AMD = torch.version.hip is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself looks at import


def wide(x: Tensor) -> bool:
    """Operands of products go in as fp32: Triton's interpreter multiplies bf16's bit patterns, without an error."""
    return INTERPRETED and x.dtype == torch.bfloat16
