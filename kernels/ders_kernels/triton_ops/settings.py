"""Whether kernels run on a GPU or in Triton's interpreter, and what the latter can't do."""

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself looks at import


def wide(x: Tensor) -> bool:
    """Operands of products go in as fp32: Triton's interpreter multiplies bf16's bit patterns, without an error."""
    return INTERPRETED and x.dtype == torch.bfloat16
