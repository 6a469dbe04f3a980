"""Inner products of every two experts: blocks of columns widened to fp32 and multiplied by BLAS, added in fp64.

A block's sums have an error of about 1e-7 of the entries' sizes, and adding blocks adds none (a bf16 product, whose output
is rounded to bf16, is 1000 times as far off). Copies stay in the cache; each byte is read once.
"""

import torch
from torch import Tensor

COLUMNS = 1 << 14


def expert_gram(experts: Tensor) -> Tensor:
    """[E, n] floats -> fp64 [E, E]"""
    total = torch.zeros(experts.shape[0], experts.shape[0], dtype=torch.float64)
    for block in experts.split(COLUMNS, dim=1):
        wide = block.float()
        total += wide @ wide.T
    return total
