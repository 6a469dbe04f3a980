"""A checkpoint by itself: is it what ders.json says, or, where it is a plain one, can it be read through?

One pass: a group's tensors are hashed, then its experts decoded from what the page cache still holds.
"""

import json
from collections.abc import Iterator
from functools import partial

import numpy as np
from blake3 import blake3
from ders_kernels.cpu_ops import floats

from .describe import file_hash
from .engines import local
from .errors import CheckpointError
from .findings import Report
from .layouts import ExpertGroup, find_layout, unsliced
from .report import Progress
from .restore import check_places, source_specs
from .source import DersSource, Source

Found = list[tuple[str, str]]  # (where, problem or ""), check by check


def intact(source: DersSource, report: Report, elsewhere: set[str], jobs: int, progress: Progress) -> None:
    """Every file and tensor has its hash in ders.json, every expert decodes to the bits noted at conversion.

    Groups named in `elsewhere` are left out: whoever compares them checks them (`damage`, `decodes`).
    """
    check_places(source)
    for where, problem in _misplaced(source):
        report.add(where, problem)
    folder, manifest = source.reader.folder, source.manifest
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            report.add(name, "missing; ders.json lists it")
        else:
            report.add(name, "" if file_hash(path) == expected else "changed: it does not have its hash in ders.json")
    own = {name for group in source.groups for name in source.part_specs(group)}
    tasks = [partial(damage, source, [name]) for name in source.reader.tensors if name not in own]
    tasks += [partial(_group, source, group, progress) for group in source.groups if group.name not in elsewhere]
    for found in local.run(tasks, jobs):
        for where, problem in found:
            report.add(where, problem)


def damage(source: DersSource, names: list[str]) -> Found:
    """Which part of each tensor does not have its hash in ders.json."""
    return [(name, _damage_of(source, name)) for name in names]


def decodes(source: DersSource, group: ExpertGroup, progress: Progress) -> Found:
    """Whether every expert of a group still decodes to its `restored_hash`."""
    digests, problems = [blake3() for _ in group.members], [""] * len(group.members)
    for rows in source.blocks(group):
        base = source.read_base(group, rows)
        for i, digest in enumerate(digests):
            try:
                bits = base if problems[i] else source.decode(group, i, rows, base)
                digest.update(bits.reshape(-1).view(np.uint8))
            except CheckpointError as error:
                problems[i] = f"does not decode: {error}"
            progress.advance(base.nbytes)
    for i, (member, digest) in enumerate(zip(source.entry(group)["members"], digests, strict=True)):
        if not problems[i] and digest.hexdigest() != member["restored_hash"]:
            problems[i] = "does not decode to the bits noted at conversion"
    return [(f"{group.name}, expert {label}", problem) for (label, _), problem in zip(group.members, problems)]


def _group(source: DersSource, group: ExpertGroup, progress: Progress) -> Found:
    found = damage(source, source.tensors_of(group)) + decodes(source, group, progress)
    source.done(group, range(len(group.members)))
    return found


def _misplaced(source: DersSource) -> Iterator[tuple[str, str]]:
    """Experts whose place in the source is not the one that the source's own layout gives them."""
    config = json.loads(source.manifest["source"]["config"])
    layout = find_layout(source_specs(source), config, include_shared=source.shared)
    expected = {(group.name, label): view for group in layout.groups for label, view in group.members}
    for group in source.groups:
        for label, view in group.members:
            if expected.get((unsliced(group.name), label)) != view:
                yield (
                    f"{group.name}, expert {label}",
                    f"ders.json places it in {view.tensor}, its source's layout elsewhere",
                )


def _damage_of(source: DersSource, name: str) -> str:
    """Which part of a tensor does not have its hash in ders.json, or ""."""
    expected = source.manifest["tensors"][name]
    found = source.reader.hashes(name, len(expected))
    bad = [number for number, (here, noted) in enumerate(zip(found, expected, strict=True)) if here != noted]
    labels = source.slice_labels.get(name, [])
    where = f"expert {', '.join(labels[number] for number in bad)}: " if bad and labels else ""
    return (
        f"{where}damaged: its bytes in {source.reader.places[name].file} do not have their hash in ders.json"
        if bad
        else ""
    )


def readable(source: Source, report: Report, jobs: int, progress: Progress) -> None:
    """Every expert of a plain checkpoint is there, finite, and not all zeros."""
    for problems in local.run([partial(_finite, source, group, progress) for group in source.groups], jobs):
        for where, problem in problems:
            report.add(where, problem)


def _finite(source: Source, group: ExpertGroup, progress: Progress) -> Found:
    found = []
    for i, (label, view) in enumerate(group.members):
        problem, zero = "", True
        for rows in source.blocks(group):
            bits = source.read(group, i, rows)
            values = floats.widen(bits, group.dtype)
            zero &= not (bits << 1).any()  # but for the sign; as numbers, numpy warns of NaNs
            bad = floats.first_nonfinite(values)
            if bad >= 0 and not problem:
                row, column = rows.start + bad // group.shape[1], bad % group.shape[1]
                problem = f"{values.flat[bad]} at [{row}, {column}] ({view.tensor})"
            progress.advance(values.nbytes // 2)
        found.append((f"{group.name}, expert {label}", problem or (f"is all zeros ({view.tensor})" if zero else "")))
    return found
