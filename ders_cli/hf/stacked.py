"""Synthesised experts that are kept run as stock ones do: stacked tensors in the stock module, and its own code.

So where nothing is left to gain from base and deltas, no time is lost to them either. The tensors are in the cache of all
layers and count there; the stock module has them only during a call.
"""

import torch
from torch import Tensor, nn

from ..runtime.experts import AnyProjection
from ..runtime.projection import WEIGHTS
from .stock import STACKED, matrices


class Stacked:
    """The stock module of a layer, whose matrices are on the meta device but for the time of a call."""

    def __init__(self, stock: nn.Module):
        self._stock = stock

    def run(self, own: nn.Module, projections: dict[str, list[tuple[AnyProjection, int]]], *call: Tensor) -> Tensor:
        """stock(*call) with the weights of `projections`, {projection: (module, member) of expert 0, 1, ...}.

        `own` has the parameters and buffers beside the matrices; it is what the cache knows the tensors by.
        """
        stock = self._stock
        meta = {name: stock._parameters[name] for name in STACKED if name in stock._parameters}
        for beside in (own._parameters, own._buffers):
            (stock._parameters if beside is own._parameters else stock._buffers).update(beside)
        try:
            mark = tuple(each[0][0].mark() for each in projections.values())
            for number, name in enumerate(meta):
                stock._parameters[name] = WEIGHTS.get(
                    own, number, mark, lambda name=name: self._make(name, meta[name], projections)
                )
            return stock(*call)
        finally:
            stock._parameters.update(meta)

    def _make(self, name: str, meta: Tensor, projections: dict[str, list[tuple[AnyProjection, int]]]) -> Tensor:
        """One stacked tensor, filled expert by expert."""
        base = projections["up"][0][0].base
        with torch.inference_mode(False), torch.no_grad():
            made = nn.Parameter(torch.empty(meta.shape, dtype=base.dtype, device=base.device), requires_grad=False)
            self._stock._parameters[name] = made
            for projection, view in matrices(self._stock).items():
                if not view.is_meta and view.untyped_storage().data_ptr() == made.untyped_storage().data_ptr():
                    for expert, (module, member) in enumerate(projections[projection]):
                        view[expert].copy_(module.weight(member))
        return made
