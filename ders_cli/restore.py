"""DeRS -> the plain MoE checkpoint: the source's own names, layout, shards, header bytes and config.json.

Every expert is hashed on the way (plain.py); with the exact codec its hash is the original expert's, so the files are
the original's bytes.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .aligned import orders_of
from .checkpoint.reader import MANIFEST, NOT_FINITE, object_in, parse_header
from .checkpoint.tensor import TensorSpec
from .errors import CheckpointError, UsageError
from .layouts import MatrixView
from .output import Options, refuse_occupied
from .plain import specs_of, write_plain
from .source import DersSource


def source_specs(source: DersSource) -> dict[str, TensorSpec]:
    """Every tensor of the original, as ders.json lists them."""
    files = source.manifest["source"]["files"].values()
    return {name: spec for entry in files for name, spec in specs_of(entry).items()}


def check_places(source: DersSource) -> None:
    """Raise CheckpointError unless ders.json's source files are made of just the experts and the copied tensors."""
    _check_texts(source.manifest["source"], source.reader.folder)
    listed, filled, views = source_specs(source), defaultdict(int), defaultdict(list)
    for group in source.groups:
        for label, view in group.members:
            spec, (rows, columns) = listed.get(view.tensor), group.shape
            last = view.offset + (rows - 1) * view.row_stride + (columns - 1) * view.column_stride
            if spec is None or spec.dtype != group.dtype or last >= spec.size:
                raise CheckpointError(f"ders.json: {group.name}, expert {label}: has no place in {view.tensor!r:.120}")
            filled[view.tensor] += rows * columns
            views[view.tensor].append(view)
    orders_of(source)  # each of them is one
    for name, spec in listed.items():
        if name in filled and filled[name] != spec.size:
            raise CheckpointError(f"ders.json: {name}: {spec.size} elements, of which experts fill {filled[name]}")
        if name in views and not _disjoint([_comb(view) for view in views[name]]):
            raise CheckpointError(f"ders.json: {name}: experts in it overlap, and leave holes")
        if name not in filled and source.copied.get(name) != spec:
            raise CheckpointError(f"{name}: ders.json lists it as a tensor of the source, but it is not here as such")


def _check_texts(form: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError where a text that restoring writes as it is does not say what ders.json says."""
    where = folder / MANIFEST
    object_in(form["config"].encode(), where, "source.config", NOT_FINITE)
    names = Counter(name for entry in form["files"].values() for name, _, _ in entry["tensors"])
    if twice := next((name for name, times in names.items() if times > 1), None):
        raise CheckpointError(f"ders.json: source.files: {twice}: stands in two files")
    for file, entry in form["files"].items():
        if "header" in entry:
            header, _ = parse_header(entry["header"].encode(), where)
            if list(header.tensors.items()) != list(specs_of(entry).items()) or header.metadata != entry["metadata"]:
                raise CheckpointError(f"ders.json: source.files: {file}: its header's text is of other tensors")
    if form["index"] and "text" in form["index"]:
        placed = {name: file for file, entry in form["files"].items() for name, _, _ in entry["tensors"]}
        if object_in(form["index"]["text"].encode(), where, "source.index").get("weight_map") != placed:
            raise CheckpointError("ders.json: source.index: its text places tensors in other files")


# Where a matrix's elements stand: the first, then (stride, count), the widest stride first.
Comb = tuple[int, tuple[tuple[int, int], ...]]


def _comb(view: MatrixView) -> Comb:
    levels = ((view.row_stride, view.shape[0]), (view.column_stride, view.shape[1]))
    return view.offset, tuple(sorted((level for level in levels if level[1] > 1), reverse=True))


def _disjoint(combs: Iterable[Comb]) -> bool:
    """Whether no element is in two matrices of a tensor, nor twice in one.

    Matrices whose spans overlap must be woven alike: of one widest stride and count, each with its teeth in a period of its
    own. Then they are disjoint if their teeth are. Each layout that architectures.py can say is of this kind.
    """
    combs = sorted(combs)
    first = 0
    while first < len(combs):
        last, end = first, _end(combs[first])
        while last + 1 < len(combs) and combs[last + 1][0] < end:
            last += 1
            end = max(end, _end(combs[last]))
        if not _woven(combs[first : last + 1]):
            return False
        first = last + 1
    return True


def _woven(combs: list[Comb]) -> bool:
    (offset, levels), *others = combs
    if not levels:
        return not others
    (stride, _), teeth = levels[0], [(begin, rest[1:]) for begin, rest in combs]
    alike = all(rest[:1] == levels[:1] for _, rest in combs)
    return alike and all(_end(tooth) - offset <= stride for tooth in teeth) and _disjoint(teeth)


def _end(comb: Comb) -> int:
    """One behind the last element."""
    return comb[0] + sum(stride * (count - 1) for stride, count in comb[1]) + 1


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
