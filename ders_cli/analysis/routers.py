"""How alike the rows of a layer's router are: rows that point one way send their experts the same tokens.

A router is known by its name and shape: a matrix [E, hidden] of the experts' layer with a part `gate`, `router` or `wg` in
its name, outside attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from ders_kernels.cpu_ops import floats

from ..checkpoint.tensor import FLOATS, STORAGE
from ..layouts import IN_LAYER, ExpertGroup
from ..source import Source

PARTS = {"gate", "router", "wg", "gate_network"}


@dataclass(frozen=True)
class Router:
    """cosine fp64 [E, E] of the rows; NaN where one of them holds a number that is not finite."""

    layer: int
    name: str
    cosine: np.ndarray


def find_routers(source: Source, layers: Mapping[str, Mapping[str, ExpertGroup]]) -> list[Router]:
    """One for each layer that has one, in the layers' order."""
    found: dict[str, Router] = {}
    for groups in layers.values():
        group = next(iter(groups.values()))
        name = _name_of_router(source, group)
        if name is not None and name not in found:  # fine-grained slices of one layer share it
            found[name] = Router(group.layer, name, _cosine(_read(source, name)))
    return list(found.values())


def _name_of_router(source: Source, group: ExpertGroup) -> str | None:
    experts = sum(label != "shared" for label, _ in group.members)
    stem, layer, _ = IN_LAYER.fullmatch(group.name).groups()
    for name, spec in source.copied.items():
        match = IN_LAYER.fullmatch(source.aliases.get(name, name))
        if match is None or match.groups()[:2] != (stem, layer):
            continue
        parts = match[3].split(".")
        if PARTS.isdisjoint(parts) or any("attn" in part or "attention" in part for part in parts):
            continue
        if len(spec.shape) == 2 and spec.shape[0] == experts > 1 and spec.dtype in FLOATS:
            return name
    return None


def _read(source: Source, name: str) -> np.ndarray:
    """fp32 [E, hidden]."""
    spec = source.copied[name]
    bits = np.concatenate([np.frombuffer(chunk, np.uint8) for chunk in source.chunks(name)])
    return floats.widen(bits.view(STORAGE[spec.dtype]).reshape(spec.shape), spec.dtype)


def _cosine(rows: np.ndarray) -> np.ndarray:
    """A row of zeros has cosine 0 with all others."""
    wide = rows.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
        units = wide / np.where(norms > 0, norms, 1)
        return np.clip(units @ units.T, -1, 1)
