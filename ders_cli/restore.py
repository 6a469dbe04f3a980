"""DeRS -> the plain MoE checkpoint: the source's own names, layout, shards, header bytes and config.json.

Every expert is hashed on the way (plain.py); with the exact codec its hash is the original expert's, so the files are
the original's bytes.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from .checkpoint.tensor import TensorSpec
from .errors import CheckpointError, UsageError
from .output import Options, refuse_occupied
from .plain import specs_of, write_plain
from .source import DersSource


def source_specs(source: DersSource) -> dict[str, TensorSpec]:
    """Every tensor of the original, as ders.json lists them."""
    files = source.manifest["source"]["files"].values()
    return {name: spec for entry in files for name, spec in specs_of(entry).items()}


def check_places(source: DersSource) -> None:
    """Raise CheckpointError unless ders.json's source files are made of just the experts and the copied tensors."""
    listed, filled = source_specs(source), defaultdict(int)
    for group in source.groups:
        for label, view in group.members:
            spec, (rows, columns) = listed.get(view.tensor), group.shape
            last = view.offset + (rows - 1) * view.row_stride + (columns - 1) * view.column_stride
            if spec is None or spec.dtype != group.dtype or last >= spec.size:
                raise CheckpointError(f"ders.json: {group.name}, expert {label}: has no place in {view.tensor!r:.120}")
            filled[view.tensor] += rows * columns
    for name, spec in listed.items():
        if name in filled and filled[name] != spec.size:
            raise CheckpointError(f"ders.json: {name}: {spec.size} elements, of which experts fill {filled[name]}")
        if name not in filled and source.copied.get(name) != spec:
            raise CheckpointError(f"{name}: ders.json lists it as a tensor of the source, but it is not here as such")
    try:
        if not isinstance(json.loads(source.manifest["source"]["config"]), dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(f"ders.json: source.config: expected config.json's text: {error}") from None


def restore(source: DersSource, out: Path, options: Options) -> dict[str, Any]:
    """Write the plain checkpoint; returns the bytes written. Raises CheckpointError where a hash does not match."""
    refuse_occupied(out, options, source.reader.folder, addresses=[source.reader.address])
    check_places(source)
    return write_plain(source, out, options, {"source": source.manifest["checksum"]}, f"restoring {out.name}")


def require_ders(source: object, folder: Path | str) -> DersSource:
    """The source as a DersSource. Raises UsageError if it is a plain checkpoint."""
    if not isinstance(source, DersSource):
        raise UsageError(f"{folder}: no ders.json; this is a plain checkpoint, there is nothing to restore")
    return source
