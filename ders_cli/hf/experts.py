"""DersExperts in the place of a stock experts module: with its activation, its biases and its other attributes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..runtime import gpu
from ..runtime.experts import AnyProjection, DersExperts
from ..runtime.group import MixedGroup, RuntimeGroup
from ..runtime.projection import WEIGHTS
from .stacked import Stacked
from .stock import STACKED

GROUPED_BYTES = 16  # transformers' grouped_mm, its default, refuses rows of other lengths


class HfExperts(DersExperts):
    """Packed experts, on the meta device until the checkpoint is loaded.

    What the stock module has beside the expert matrices stays under its own names: gpt_oss's biases are parameters
    `gate_up_proj_bias` and `down_proj_bias` here as there. The gate is the stock class's own `_apply_gate`.
    """

    def __init__(self, stock: nn.Module, groups: Sequence[RuntimeGroup | MixedGroup], dtype: torch.dtype | None):
        biases = self._bias if stock.has_bias else None
        super().__init__(groups, self._activate, biases, device="meta", dtype=dtype)
        self._stock_class, self._stacked = type(stock), Stacked(stock)
        known = vars(nn.Module()).keys() | vars(self).keys()
        vars(self).update({name: value for name, value in vars(stock).items() if name not in known})
        for name, child in stock.named_children():
            self.add_module(name, child)
        for name, parameter in stock.named_parameters(recurse=False):
            if name not in STACKED:
                self.register_parameter(name, parameter)
        for name, buffer in stock.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in stock._non_persistent_buffers_set)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As DersExperts, and as the stock module itself where all weights are synthesised and have room to be kept."""
        if not gpu.runs(self, hidden_states) and self._runs_as_stock(hidden_states, top_k_index):
            projections = {
                p: [(m, m.member_of[e]) for e in range(len(m.member_of))] for p, m in self._projections().items()
            }
            return self._stacked.run(self, projections, hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def train(self, mode: bool = True) -> "HfExperts":
        WEIGHTS.forget(self)
        return super().train(mode)

    def _projections(self) -> dict[str, AnyProjection]:
        """{"gate": ...} of a layer without slices."""
        return {p: m for p in ("gate", "up", "down") if (m := getattr(self, f"{p}_proj", None)) is not None}

    def _runs_as_stock(self, x: Tensor, index: Tensor) -> bool:
        if self.training or self.way == "apart" or torch.is_autocast_enabled(x.device.type):
            return False
        projections = self._projections().values()
        if not projections or any(
            m.base.dtype != x.dtype or m.differentiates(x) or not m.has_room() for m in projections
        ):
            return False
        if any(side * x.element_size() % GROUPED_BYTES for side in self.up_proj.group.shape):
            return False
        active = index.unique().numel()
        return not any(self._apart(m, x, index.numel(), active) for m in projections)

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
