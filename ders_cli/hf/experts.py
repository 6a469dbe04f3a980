"""DersExperts in the place of a stock experts module: with its activation, its biases and its other attributes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..runtime.experts import DersExperts
from ..runtime.group import RuntimeGroup
from .stock import STACKED


class HfExperts(DersExperts):
    """Packed experts, on the meta device until the checkpoint is loaded.

    What the stock module has beside the expert matrices stays under its own names: gpt_oss's biases are parameters
    `gate_up_proj_bias` and `down_proj_bias` here as there. The gate is the stock class's own `_apply_gate`.
    """

    def __init__(self, stock: nn.Module, groups: Sequence[RuntimeGroup], dtype: torch.dtype | None):
        biases = self._bias if stock.has_bias else None
        super().__init__(groups, self._activate, biases, device="meta", dtype=dtype)
        self._stock_class = type(stock)
        known = vars(nn.Module()).keys() | vars(self).keys()
        vars(self).update({name: value for name, value in vars(stock).items() if name not in known})
        for name, child in stock.named_children():
            self.add_module(name, child)
        for name, parameter in stock.named_parameters(recurse=False):
            if name not in STACKED:
                self.register_parameter(name, parameter)
        for name, buffer in stock.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in stock._non_persistent_buffers_set)

    def _activate(self, gate: Tensor | None, up: Tensor) -> Tensor:
        """gate, up [tokens, inner] -> [tokens, inner], joined as the stock `_apply_gate` expects them."""
        if gate is None:
            return self.act_fn(up)
        joined = torch.cat((gate, up), -1) if self.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return self._stock_class._apply_gate(self, joined)

    def _bias(self, projection: str, expert: int) -> Tensor:
        """[out] of one expert."""
        if projection == "down":
            return self.down_proj_bias[expert]
        if not self.has_gate:
            return self.up_proj_bias[expert]
        both = self.gate_up_proj_bias[expert]
        gate, up = both.chunk(2) if self.is_concatenated else (both[::2], both[1::2])
        return gate if projection == "gate" else up
