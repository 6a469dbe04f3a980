"""The parameters of a group's delta, under their names on disk: `delta.codes`, `delta.then.scale`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checkpoint.tensor import FLOATS, TensorSpec
from .dtypes import TORCH


class Parts(nn.Module):
    """{part: spec} as parameters; a dot in a part's name is a module in a module. Float ones have `dtype`, if given.

    Integers are parameters too, without a gradient: one tensor on disk, one entry of the state dict.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], trainable: frozenset[str], device=None, dtype=None):
        super().__init__()
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name, spec in specs.items():
            above, _, last = name.rpartition(".")
            owner: nn.Module = self
            for step in above.split(".") if above else ():
                if step not in owner._modules:
                    owner.add_module(step, nn.Module())
                owner = owner._modules[step]
            kind = dtype if dtype is not None and spec.dtype in FLOATS else TORCH[spec.dtype]
            empty = torch.empty(spec.shape, dtype=kind, device=device)
            owner.register_parameter(last, nn.Parameter(empty, requires_grad=name in trainable))
            self._places[name] = owner, last

    def tensors(self) -> dict[str, Tensor]:
        """{part: its parameter}"""
        return {name: owner._parameters[last] for name, (owner, last) in self._places.items()}
