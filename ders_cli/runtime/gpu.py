"""A layer of packed experts on a GPU: as its parameters are, through ders_kernels.dispatch, in inference.

Not for what those kernels don't compute: expert biases, sliced experts, a gradient, an activation that isn't one of theirs,
codecs without a packed delta, several codecs in one group. Such layers go the way that they go on a CPU.
"""

import logging
from collections.abc import Hashable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from ders_kernels import dispatch
from ders_kernels.deltas import Projection
from ders_kernels.reference import ACTIVATIONS
from torch import Tensor

from .mixed import MixedProjection
from .projection import DersProjection

if TYPE_CHECKING:
    from .experts import Activate, AnyProjection, DersExperts

_log = logging.getLogger(__name__)
_said: set[str] = set()
_names: WeakKeyDictionary["DersExperts", tuple[Hashable, str]] = WeakKeyDictionary()


def runs(layer: "DersExperts", x: Tensor) -> bool:
    """Whether `forward` computes this layer for such hidden states; asked before any other way."""
    if x.device.type != "cuda" or layer.training or layer.way == "whole" or layer.biases is not None:
        return False
    projections = _projections(layer)
    if projections is None or any(p is not None and p.differentiates(x) for p in projections):
        return False
    made = [packed(p) for p in projections if p is not None]
    deltas = [p.delta for p in made if p is not None and p.delta is not None]
    if None in made or not deltas or not _name(layer):
        return False
    try:
        dispatch.choose("moe_forward", "triton", x, *deltas)
    except dispatch.Refused as error:
        if str(error) not in _said:
            _said.add(str(error))
            _log.warning("experts are decoded on the CPU: %s", error)
        return False
    return True


def forward(layer: "DersExperts", x: Tensor, index: Tensor, gates: Tensor, backend: str = "triton") -> Tensor:
    """[T, hidden], int64 [T, k], [T, k] -> [T, hidden] of the same dtype."""
    gate, up, down = (p and packed(p) for p in _projections(layer))
    return dispatch.moe_forward(x, index, gates, gate, up, down, _name(layer), backend=backend)


def packed(projection: DersProjection | MixedProjection) -> Projection | None:
    """Base and packed delta of a group, of the parameters as they are now; None: its codec has no packed delta."""
    if isinstance(projection, MixedProjection):
        return None
    if projection.no_delta:
        return Projection(projection.base.detach(), None)
    delta = projection.made_for_all(projection.packed)
    return None if delta is None else Projection(projection.base.detach(), delta)


def _projections(layer: "DersExperts") -> "tuple[AnyProjection | None, AnyProjection, AnyProjection] | None":
    """gate, up, down of a layer without slices whose members are experts 0, 1, ... in order."""
    up = getattr(layer, "up_proj", None)
    if up is None or up.group.experts != tuple(range(len(up.group.experts))):
        return None
    return layer.gate_proj, up, layer.down_proj


def _name(layer: "DersExperts") -> str:
    """Tried once for each activation that the layer has had."""
    now = (layer.activate, getattr(layer, "act_fn", None), layer.gate_proj is not None)
    if (known := _names.get(layer)) is None or known[0] != now:
        known = _names[layer] = (now, activation_name(layer.activate, now[2]))
    return known[1]


def activation_name(activate: "Activate", gated: bool) -> str:
    """Which of reference.ACTIVATIONS it is, times up if gated; "" if none.

    Tried on values up to 2187, where clamped activations differ: a function can't be asked for its formula.
    """
    up = torch.linspace(-3, 3, 601) ** 7
    gate = up.flip(0) * 0.7
    try:
        found = activate(gate if gated else None, up)
    except RuntimeError:  # has parameters on another device
        return ""
    for name, function in ACTIVATIONS.items():
        expected = function(gate) * up if gated else function(up)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6):
            return name
    return ""
