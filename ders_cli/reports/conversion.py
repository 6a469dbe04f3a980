"""The report that every conversion leaves: its folder. What ders.json noted, as a document; no weights are read.

docs/report-schema.json has the fields.
"""

import math
from pathlib import Path
from typing import Any

from ..codecs.mixed import family_of
from ..errors import CheckpointError, UsageError
from ..layouts import ExpertGroup
from ..remote.address import is_remote, local_path
from ..source import DersSource, open_source
from .document import SCHEMA, check_report, read_report

SIZES = ("experts", "base", "delta", "weights", "bits_per_delta_weight")
ERRORS = ("weight", "delta", "kept", "max_abs", "cosine")


def open_report(location: str | Path, scratch: Path | None = None) -> dict[str, Any]:
    """The report in a JSON file, or that of a DeRS folder or address. Raises UsageError, CheckpointError."""
    if not is_remote(location) and not local_path(location).is_dir():
        return read_report(local_path(location))
    with open_source(location, scratch=scratch) as source:
        if not isinstance(source, DersSource):
            raise UsageError(
                f"{source.reader.address}: a plain checkpoint, which has no report yet; `ders analyze` makes one"
            )
        return conversion_report(source)


def conversion_report(source: DersSource) -> dict[str, Any]:
    """The conversion document of a DeRS checkpoint, from ders.json and the weight files' headers. Raises CheckpointError."""
    manifest = source.manifest
    document = {
        "schema": SCHEMA,
        "kind": "conversion",
        "command": "report",
        "tool": manifest["tool"],
        "model": source.reader.address,
        "architecture": manifest["source"]["layout"],
        "dtype": "+".join(dict.fromkeys(group.dtype for group in source.groups)),
        "base": manifest["recipe"]["base"],
        "bytes": {name: manifest["bytes"].get(name) for name in SIZES},
        "recipe": manifest["recipe"],
        "groups": [_group(source, *both) for both in zip(source.groups, manifest["groups"], strict=True)],
    }
    try:
        return check_report("ders.json", document)
    except UsageError as error:  # not what any ders has written
        raise CheckpointError(f"{source.reader.address}: {error}") from None


def _group(source: DersSource, group: ExpertGroup, entry: dict[str, Any]) -> dict[str, Any]:
    parts, members = source.part_specs(group), entry["members"]
    return {
        "name": group.name,
        "layer": group.layer,
        "projection": group.projection,
        "shape": list(group.shape),
        "dtype": group.dtype,
        "experts": [member["label"] for member in members],
        "plan": _terms(source, group),
        "bytes": sum(spec.nbytes for part, spec in parts.items() if part != f"{group.name}.base"),
        "error": {name: [_finite(member["error"].get(name)) for member in members] for name in ERRORS},
    }


def _terms(source: DersSource, group: ExpertGroup) -> list[str]:
    """Each expert's codec as a term of --delta."""
    experts = len(group.members)
    return [family_of(source.codecs[group.name], experts, i)[0].codec.term for i in range(experts)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
