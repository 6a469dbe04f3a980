"""ders.json of a conversion: the recipe in effect, the source's own form, and for every group its codec and errors.

docs/format.md has the fields. Built twice: once from placeholders, to know its size beforehand, once from results.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from . import __version__
from .checkpoint.manifest import FORMAT, planned_bytes
from .checkpoint.reader import MAX_JSON_BYTES
from .checkpoint.tensor import TensorSpec
from .differences import Differences
from .errors import UnsupportedError
from .output import carry
from .plan import Plan, ShardPlan, Unit
from .recipe import Recipe
from .report import human_bytes
from .source import Source

BLANK = "0" * 64
MOST = 10**15  # a number of bytes at its widest
WIDEST = -1.23456e-100


def describe(
    source: Source,
    recipe: Recipe,
    plan: Plan,
    results: list[dict[str, Any]],
    hash_of: Callable[[Path], str],
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """ders.json, but for its checksum. `hash_of` a carried file: its BLAKE3, unless a plan only asks for the size.

    `calibration`: what chose the parts, where that was not the codecs themselves.
    """
    streams = [r["sizes"][name] for r, shard in zip(results, plan.shards, strict=True) for name in shard.appended]
    base = sum(TensorSpec(u.group.shape, u.group.dtype).nbytes for u in plan.units)
    deltas = sum(spec.nbytes for u in plan.units for spec in u.parts.values() if spec) - base + sum(streams)
    weights = sum(u.group.shape[0] * u.group.shape[1] * len(u.group.members) for u in plan.units)
    return {
        "format": FORMAT,
        "tool": f"ders-cli {__version__}",
        "recipe": recipe.model_dump(mode="json"),
        **({"upcycling": source.upcycling} if source.upcycling else {}),
        **({"aligned": list(source.aligned)} if source.aligned else {}),
        **({"calibration": calibration} if calibration else {}),
        "source": source.form(),
        "groups": [entry for result in results for entry in result["groups"]],
        "guards": [name for shard in plan.shards for name in shard.guards],
        "tensors": {name: digest for result in results for name, digest in result["hashes"].items()},
        "files": {path.name: hash_of(path) for path in carry(source.reader.folder)}
        | {"config.json": blake3(config_text(source)).hexdigest()},
        "bytes": {
            "experts": plan.expert_bytes,
            "base": base,
            "delta": deltas,
            "weights": sum(r["bytes"] for r in results),
            "bits_per_delta_weight": float(f"{8 * deltas / weights:.5e}"),
        },
    }


def planned_manifest_bytes(
    source: Source, recipe: Recipe, plan: Plan, calibration: dict[str, Any] | None = None
) -> int:
    """The size that ders.json will have. Raises UnsupportedError if that is more than ders reads."""
    results = [_placeholder(shard) for shard in plan.shards]
    widest = dict.fromkeys(Differences().errors(), WIDEST)
    groups = (
        group_entry(unit, blank, blank, [widest] * len(blank))
        for shard in plan.shards
        for unit in shard.units
        for blank in [[BLANK] * len(unit.group.members)]
    )
    size = planned_bytes(describe(source, recipe, plan, results, lambda path: BLANK, calibration), groups)
    if size > MAX_JSON_BYTES:
        matrices = sum(len(unit.group.members) for unit in plan.units)
        raise UnsupportedError(
            f"{source.reader.address}: ders.json would take {human_bytes(size)} for {matrices} matrices of experts, and ders "
            f"reads one of at most {human_bytes(MAX_JSON_BYTES)}; use fewer experts"
        )
    return size


def _placeholder(shard: ShardPlan) -> dict[str, Any]:
    """A shard's result in its widest form, without its groups."""
    slices = shard.slices
    hashes = {name: [BLANK] * slices.get(name, 1) for name in (*shard.fixed, *shard.appended)}
    return {"hashes": hashes, "groups": [], "bytes": MOST, "sizes": dict.fromkeys(shard.appended, MOST)}


def group_entry(unit: Unit, came: list[str], restored: list[str], errors: list[dict[str, float]]) -> dict[str, Any]:
    """One group: where its experts came from, their hashes, and what the codec changed."""
    group = unit.group
    members = [
        {
            "label": label,
            "tensor": view.tensor,
            "offset": view.offset,
            "strides": [view.row_stride, view.column_stride],
            "source_hash": source_hash,
            "restored_hash": restored_hash,
            "error": {
                name: value if math.isfinite(value) else None for name, value in error.items()
            },  # JSON has no infinity
        }
        for (label, view), source_hash, restored_hash, error in zip(group.members, came, restored, errors, strict=True)
    ]
    return {
        "name": group.name,
        "layer": group.layer,
        "projection": group.projection,
        "shape": list(group.shape),
        "dtype": group.dtype,
        "codec": unit.codec.config,
        "members": members,
    }


def config_text(source: Source) -> bytes:
    """The source's config.json with `quantization_config` added."""
    config = source.config | {"quantization_config": {"quant_method": "ders", "format": FORMAT}}
    return (json.dumps(config, indent=2) + "\n").encode()


def file_hash(path: Path) -> str:
    """BLAKE3 of a file, read in pieces up to the size that it has now: some that a link may lead to never end."""
    digest = blake3()
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        while data := file.read(min(4 << 20, left)):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()
