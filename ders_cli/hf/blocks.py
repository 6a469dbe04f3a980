"""A layer with fewer experts than the config's number: its block is made for as many as the checkpoint has.

transformers builds every MoE block of a model for the same number of experts. `ders upcycle --experts-per-layer 2-4-6-8` (MoLA,
arXiv 2402.08562) gives each part of the depth its own; the router then has fewer rows, and takes no more than there are.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..source import DersSource
from .stock import STACKED


def fit_block(model: PreTrainedModel, source: DersSource, path: str, name: str, experts: int) -> None:
    """Make the block around the experts module `name` (`path` in ders.json) one of so many experts, on the meta device."""
    own, block_path = model.get_submodule(name), path.rpartition(".")[0]
    for parameter in STACKED:
        if (stacked := own._parameters.get(parameter)) is not None:
            setattr(own, parameter, _empty(stacked, (experts, *stacked.shape[1:])))
    in_memory = {source.aliases.get(tensor, tensor): spec for tensor, spec in source.copied.items()}
    block = model.get_submodule(name.rpartition(".")[0])
    for place, module in block.named_modules():
        if hasattr(module, "num_experts"):
            module.num_experts = min(module.num_experts, experts)
        if hasattr(module, "top_k"):
            module.top_k = min(module.top_k, experts)
        if module is own:
            continue
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                spec = in_memory.get(".".join(part for part in (block_path, place, key) if part))
                if tensor is not None and spec is not None and spec.shape != tuple(tensor.shape):
                    tensors[key] = _empty(tensor, spec.shape)


def _empty(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
