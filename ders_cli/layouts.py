"""Finding the experts of a checkpoint from its headers: which matrices share a base, and where each one lies.

`find_layout` turns the names and shapes of the stored tensors into groups, one per layer and projection, whose members
are [out, in] matrices whatever the file keeps: one tensor per expert, all experts stacked, gate fused with up,
transposed. A matrix is an offset and two strides inside a stored tensor, so nothing is read here and nothing has to be
rearranged later. How the experts of an architecture are stored is declared in `architectures`; shapes are only held
against that, never used to guess it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ders_cli.architectures import ARCHITECTURES, DENSE, GLU, PROJECTIONS, W132, Architecture, Storage, linears
from ders_cli.checkpoint.tensor import FLOATS, TensorSpec
from ders_cli.errors import CheckpointError, DersError, UnsupportedError

# stem, layer, name in the layer: the first number in a name is its layer's
IN_LAYER = re.compile(r"(.+?)\.([0-9]{1,9})\.(.+)")
NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")
SLICE = re.compile(r"\.slice[0-9]+(?=\.[a-z]+_proj$)")
PER_EXPERT = re.compile(r"((?:.+\.)?experts\.\{\})\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
# how compressed-tensors, GPTQ and AWQ, and gpt-oss's mxfp4 end the name of packed weights, and the plain ending
PACKED = {".weight_packed": ".weight", ".qweight": ".weight", "_blocks": ""}
# a text decoder by its several names; a stem that isn't here (mtp.layers) has no counterpart under another name
DECODERS = ("model.layers", "model.language_model.layers", "language_model.model.layers", "backbone.layers")
PER_LAYER = (
    "experts_per_layer"  # key of config.json: experts of each layer, where `ders upcycle` gave them different numbers
)
MOST_MATRICES = 1_000_000  # three times what the largest ders.json lists
SUBCONFIGS = ("text_config", "llm_config", "language_config", "thinker_config", "talker_config")


@dataclass(frozen=True, slots=True)
class MatrixView:
    """One [out, in] matrix inside a stored tensor.

    Element (r, c) stands at offset + r*row_stride + c*column_stride, counted in elements.
    """

    tensor: str
    shape: tuple[int, int]
    offset: int
    row_stride: int
    column_stride: int


@dataclass(frozen=True)
class ExpertGroup:
    """E matrices of one shape that share a base: the gate, up or down projections of a layer's experts.

    name: "<stem>.<layer>.<module>.<gate_proj|up_proj|down_proj>", the same whatever form the file stores.
    members: (label, view), the experts "0".."E-1" in order, then "shared" if the shared expert was asked for.
    """

    name: str
    layer: int
    projection: str
    dtype: str
    members: tuple[tuple[str, MatrixView], ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.members[0][1].shape


@dataclass(frozen=True)
class Layout:
    """What `find_layout` found.

    groups: by stem, layer, then gate, up, down.
    guards: one name per MoE layer at which stock transformers looks for the experts; a tensor of a wrong shape there
        makes it raise, where it would fill in random experts if there were nothing.
    aliases: {name on disk: canonical name} of the other tensors, where the two differ.
    """

    name: str
    groups: tuple[ExpertGroup, ...]
    guards: tuple[str, ...]
    aliases: dict[str, str]
    activation: str


@dataclass(frozen=True, slots=True)
class _Found:
    """A tensor with the `projection` of expert `number`, or of all experts (None), and the form it is stored in."""

    storage: Storage
    projection: str
    number: int | None
    tensor: str


_Views = dict[str, dict[int, MatrixView]]  # {projection: {number of the expert: its matrix}}


def find_layout(tensors: Mapping[str, TensorSpec], config: Mapping[str, Any], include_shared: bool = False) -> Layout:
    """Say where the experts of a checkpoint lie, from its headers and its config.json.

    Raises CheckpointError if experts are missing or contradict each other or the config, UnsupportedError if the model
    is dense, its experts are quantised, or they are stacked in a way that no row of `architectures` declares.
    """
    model_type, declared = _declared(config)
    rows = [declared] if declared else []
    _refuse_packed(rows, tensors)
    if not (layers := _find_experts(rows, tensors)):
        rows = _undeclared(tensors)
        layers = _find_experts(rows, tensors)
    if not layers:
        raise _no_experts(model_type, tensors)

    _refuse_swarm([one for found in layers.values() for one in found], tensors, _counts(rows[0], config))
    groups: list[ExpertGroup] = []
    guards: list[str] = []
    for (stem, layer, index), found in sorted(layers.items()):
        row, where = rows[index], f"{stem}.{layer}"
        of_layer = _group_layer(row, where, found, tensors, config, include_shared)
        groups += of_layer
        guards.append(f"{where}.{row.guard}" if row.guard else of_layer[0].members[0][1].tensor)
    if include_shared and not any(group.members[-1][0] == "shared" for group in groups):
        raise UnsupportedError(f"{guards[0]}: no shared expert beside these experts; take them without one")

    activations = _values(config, rows[0].activation)
    expert_tensors = {view.tensor for group in groups for _, view in group.members}
    canonical = {name: _canonical(rows[0], name) for name in tensors if name not in expert_tensors}
    return Layout(
        name=model_type,
        groups=tuple(groups),
        guards=tuple(guards),
        aliases={name: other for name, other in canonical.items() if name != other},
        activation=next((a for a in activations if isinstance(a, str)), rows[0].default_activation),
    )


def find_dense(
    group: ExpertGroup, dense_tensors: Mapping[str, TensorSpec], dense_config: Mapping[str, Any]
) -> MatrixView:
    """Find the matrix of a dense checkpoint from which the experts of `group` were upcycled.

    Raises CheckpointError if the dense model hasn't got it or has it in another shape.
    """
    stem, layer, _ = IN_LAYER.fullmatch(group.name).groups()
    stems = dict.fromkeys((stem, *DECODERS)) if stem in DECODERS else (stem,)
    forms = [(storage, name) for storage in DENSE if (name := storage.names().get(group.projection))]
    candidates = [(storage, f"{stem}.{layer}.{name}") for stem in stems for storage, name in forms]
    storage, name = next((c for c in candidates if c[1] in dense_tensors), (None, candidates[0][1]))
    member = group.members[0][1].tensor
    if storage is None:
        raise CheckpointError(
            f"{name}: missing (and its like) in the dense {dense_config.get('model_type', 'model')}, expected "
            f"{list(group.shape)} as the base of {member}; is it the model that was upcycled?"
        )
    view = next(_views(_Found(storage, group.projection, 0, name), dense_tensors[name], None))[1]
    if view.shape != group.shape:
        raise CheckpointError(
            f"{name}: expected {list(group.shape)} as the base of {member}, got {list(view.shape)}; "
            "is it the model that was upcycled?"
        )
    return view


def unsliced(name: str) -> str:
    """The name of the group that a fine-grained slice's group is a part of (blueprint.py); other names as they are."""
    return SLICE.sub("", name)


def find_dense_layers(tensors: Mapping[str, TensorSpec]) -> dict[tuple[str, int], dict[str, MatrixView]]:
    """The FFN of every layer of a dense decoder: (stem, layer) -> {projection: matrix}, in order of the layers.

    Raises CheckpointError where a layer has none that is known, or only a part of one.
    """
    layers = sorted({(m[1], int(m[2])) for name in tensors if (m := IN_LAYER.fullmatch(name)) and m[1] in DECODERS})
    found = {}
    for stem, layer in layers:
        forms = [{p: f"{stem}.{layer}.{name}" for p, name in storage.names().items()} for storage in DENSE]
        index = next((i for i, names in enumerate(forms) if any(name in tensors for name in names.values())), None)
        if index is None:
            raise CheckpointError(f"{stem}.{layer}: has no FFN of a known form, such as {forms[0]['up']}")
        if missing := [name for name in forms[index].values() if name not in tensors]:
            raise CheckpointError(f"{missing[0]}: missing, unlike the rest of this FFN. Is the checkpoint complete?")
        found[stem, layer] = {
            projection: next(_views(_Found(DENSE[index], projection, 0, name), tensors[name], None))[1]
            for projection, name in forms[index].items()
        }
    return found


# --- which tensors hold experts ---


def _declared(config: Mapping[str, Any]) -> tuple[str, Architecture | None]:
    """The model_type and its row; a multimodal model may be known by its text part only."""
    known = {model_type: row for row in ARCHITECTURES for model_type in row.model_types}
    types = [t for t in _values(config, "model_type") if isinstance(t, str)] or ["unknown"]
    name = next((t for t in types if t in known), types[0])
    return name, known.get(name)


def _undeclared(tensors: Iterable[str]) -> list[Architecture]:
    """Rows for experts of an unknown model_type that are Linear weights: these names leave no doubt."""
    modules = defaultdict(set)
    for name in tensors:
        if (parsed := _parse(name)) and (match := PER_EXPERT.fullmatch(parsed[2])):
            modules[match[1], match[2].startswith("w")].add(match[2])
    rows = []
    for (module, short), names in sorted(modules.items()):
        gate, up, down = W132 if short else GLU
        storage = linears(module, gate if short or gate in names else None, up, down)
        rows.append(Architecture((), module.removesuffix(".{}"), (storage,), source="the names themselves"))
    return rows


def _find_experts(rows: list[Architecture], tensors: Iterable[str]) -> dict[tuple[str, int, int], list[_Found]]:
    """{(stem, layer, index of the row): its tensors with experts}."""
    forms = defaultdict(list)
    for index, row in enumerate(rows):
        for storage in row.storages:
            for projection, template in storage.names().items():
                forms[template].append((index, storage, projection))
    layers = defaultdict(list)
    for name in tensors:
        if parsed := _parse(name):
            stem, layer, template, number = parsed
            for index, storage, projection in forms.get(template, ()):
                layers[stem, layer, index].append(_Found(storage, projection, number, name))
    return layers


def _parse(name: str) -> tuple[str, int, str, int | None] | None:
    """Stem, layer, the name in the layer with `{}` for a number, and that number; None for a tensor of no layer."""
    if (match := IN_LAYER.fullmatch(name)) is None:
        return None
    stem, layer, rest = match.groups()
    number = NUMBER.search(rest)
    return stem, int(layer), NUMBER.sub("{}", rest, count=1), int(number[0]) if number else None


def _refuse_packed(rows: list[Architecture], tensors: Mapping[str, TensorSpec]) -> None:
    templates = {name for row in rows for storage in row.storages for name in storage.names().values()}
    for name, spec in tensors.items():
        for ending, plain in PACKED.items():
            parsed = _parse(name.removesuffix(ending) + plain) if name.endswith(ending) else None
            if parsed and (parsed[2] in templates or PER_EXPERT.fullmatch(parsed[2])):
                raise UnsupportedError(_not_float(name, spec))


def _refuse_swarm(found: list[_Found], tensors: Mapping[str, TensorSpec], counts: Mapping[int, str]) -> None:
    """Raise UnsupportedError for more matrices than any ders.json lists: a header of a few bytes may claim millions."""
    matrices = 0
    for one in found:
        shape = tensors[one.tensor].shape
        stacked = next(iter(counts), 1) if one.storage.flattened else shape[0] if shape else 1
        matrices += 1 if one.number is not None else stacked
        if matrices > MOST_MATRICES:
            raise UnsupportedError(
                f"{one.tensor}: more than {MOST_MATRICES} matrices of experts up to this tensor {list(shape)!r:.80}"
            )


def _no_experts(model_type: str, tensors: Mapping[str, TensorSpec]) -> UnsupportedError:
    for name, spec in tensors.items():
        if len(spec.shape) == 3 and ".experts." in name:
            return UnsupportedError(
                f"{name}: stacked experts {list(spec.shape)}, and no row of ders_cli/architectures.py says which axis "
                f"is which for model_type {model_type!r}; store one matrix per expert or add a row"
            )
    return UnsupportedError(
        f"config.json: model_type {model_type!r} has no experts (looked for ...experts.0.gate_proj.weight, "
        "...experts.0.w1.weight and the names of known architectures); is this a dense model?"
    )


def _values(config: Mapping[str, Any], path: str | None) -> Iterator[Any]:
    """What stands under a dotted key, in the config itself and then in those of its text parts."""
    value: Any = config
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, Mapping) else None
    if path and value is not None:
        yield value
    for name in SUBCONFIGS:
        if isinstance(config.get(name), Mapping):
            yield from _values(config[name], path)


def _canonical(row: Architecture, name: str) -> str:
    for old, new in row.renames:
        name = f".{name}".replace(f".{old}", f".{new}")[1:]
    return name


# --- the groups of one layer ---


def _group_layer(
    row: Architecture,
    where: str,
    found: list[_Found],
    tensors: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    include_shared: bool,
) -> list[ExpertGroup]:
    """The groups of the layer `where` ("model.layers.3"), with nothing missing and nothing contradictory."""
    counts = _counts(row, config)
    views: _Views = {p: {} for p in PROJECTIONS if any(p in f.storage.names() for f in found)}
    for f in _orient(found, tensors):
        for number, view in _views(f, tensors[f.tensor], next(iter(counts), None)):
            if number in views[f.projection]:
                other = views[f.projection][number].tensor
                raise CheckpointError(f"{f.tensor}: expert {number} is also in {other}; which one is meant?")
            views[f.projection][number] = view
    _check_complete(where, found, views, counts)

    first, shared = found[0].storage.first, {}
    if first:
        shared = {projection: by_number.pop(0) for projection, by_number in views.items()}
    elif include_shared:
        shared = _find_shared(row, where, views, tensors)
    like = views["up"][first]
    groups = []
    for projection, by_number in views.items():
        for view in by_number.values():
            _check_like(view, projection, like, tensors)
        members = [(str(number - first), by_number[number]) for number in sorted(by_number)]
        if include_shared and shared:
            _check_like(shared[projection], projection, like, tensors, UnsupportedError, "; take no shared expert")
            members.append(("shared", shared[projection]))
        name = f"{_canonical(row, where)}.{row.module}.{projection}_proj"
        layer, dtype = int(where.rpartition(".")[2]), tensors[like.tensor].dtype
        groups.append(ExpertGroup(name, layer, projection, dtype, tuple(members)))
    return groups


def _counts(row: Architecture, config: Mapping[str, Any]) -> dict[int, str]:
    """{number of experts: the config's key that says so}; a list has one for each MoE layer."""
    counts = {}
    for key in (PER_LAYER, *row.counts):
        for value in _values(config, key):
            for count in value if isinstance(value, list) else [value]:
                if type(count) is int and count > 0:  # True is no number
                    counts.setdefault(count, key)
    return counts


def _orient(found: list[_Found], tensors: Mapping[str, TensorSpec]) -> list[_Found]:
    """Settle forms of which both orientations are about: [E, 2I, H] with [E, H, I], or [E, H, 2I] with [E, I, H].

    No shapes fit both, so this is no guess; transformers looks at the shapes too (Transpose with check_dims).
    """
    shapes = {f.projection: tensors[f.tensor].shape for f in found if f.storage.either_way}
    match shapes.get("up"), shapes.get("down"):
        case (_, a, b), (_, c, d) if (a, b) == (d, 2 * c):
            turned = [replace(f, storage=replace(f.storage, transposed=PROJECTIONS)) for f in found]
            return [t if f.storage.either_way else f for f, t in zip(found, turned, strict=True)]
    return found


def _views(found: _Found, spec: TensorSpec, count: int | None) -> Iterator[tuple[int, MatrixView]]:
    """(number, matrix) of each expert in a tensor; `count` is how many a flattened one holds."""
    storage, projection, shape = found.storage, found.projection, spec.shape
    if spec.dtype not in FLOATS:
        raise UnsupportedError(_not_float(found.tensor, spec))
    axes = 2 if storage.flattened or found.number is not None else 3
    if len(shape) != axes or 0 in shape:
        raise CheckpointError(f"{found.tensor}: expected {axes} axes, got shape {list(shape)}; is it packed or empty?")
    if storage.flattened:
        if not count or shape[0] % count:
            raise CheckpointError(f"{found.tensor}: {shape[0]} rows don't divide into {count} experts (config.json)")
        shape = (count, shape[0] // count, shape[1])
    (rows, columns), fused = shape[-2:], storage.fusion and projection != "down"
    out, in_, row_stride, column_stride = rows, columns, columns, 1
    if projection in storage.transposed:
        out, in_, row_stride, column_stride = columns, rows, 1, columns
    offset = 0
    if fused:
        if out % 2:
            raise CheckpointError(f"{found.tensor}: expected gate and up side by side, got an odd {out} of them")
        out //= 2
        start = out * row_stride if storage.fusion == "concatenated" else row_stride
        offset = start if projection == "up" else 0
        row_stride *= 1 if storage.fusion == "concatenated" else 2
    for i in range(1 if found.number is not None else shape[0]):
        number = i if found.number is None else found.number
        yield number, MatrixView(found.tensor, (out, in_), offset + i * rows * columns, row_stride, column_stride)


def _check_complete(where: str, found: list[_Found], views: _Views, counts: Mapping[int, str]) -> None:
    numbers = {number for by_number in views.values() for number in by_number}
    last = max(*numbers, found[0].storage.first)
    for projection, by_number in views.items():
        if (number := next((n for n in range(last + 1) if n not in by_number), None)) is None:
            continue
        # the missing tensor is named as its siblings are: other projections of this expert, or else other experts
        near = sorted(found, key=lambda f: f.number != number)
        storage = next(f.storage for f in near if projection in f.storage.names())
        name = f"{where}.{storage.names()[projection].replace('{}', str(number))}"
        state = f"has only {len(by_number)}" if any(f.tensor == name for f in found) else "missing"
        layer = where.rpartition(".")[2]
        raise CheckpointError(
            f"{name}: {state}; layer {layer} has experts 0..{last} otherwise. Is the checkpoint complete?"
        )
    if counts and len(numbers) not in counts:
        count, key = next(iter(counts.items()))
        raise CheckpointError(
            f"{views['up'][last].tensor}: expected {count} experts in this layer (config.json: {key}), got "
            f"{len(numbers)}. Is the checkpoint complete?"
        )


def _find_shared(
    row: Architecture, where: str, views: _Views, tensors: Mapping[str, TensorSpec]
) -> dict[str, MatrixView]:
    """{projection: matrix} of the layer's shared expert, {} if there is none."""
    for storage in row.shared:
        names = {projection: f"{where}.{name}" for projection, name in storage.names().items()}
        missing = [name for name in names.values() if name not in tensors]
        if names.keys() != views.keys() or len(missing) == len(names):
            continue
        if missing:
            raise CheckpointError(f"{missing[0]}: missing, unlike the rest of this shared expert; is a shard missing?")
        return {p: next(_views(_Found(storage, p, 0, name), tensors[name], None))[1] for p, name in names.items()}
    return {}


def _check_like(
    view: MatrixView,
    projection: str,
    like: MatrixView,
    tensors: Mapping[str, TensorSpec],
    error: type[DersError] = CheckpointError,
    remedy: str = "",
) -> None:
    """All experts of a layer are of one dtype and one shape, the down projections turned round."""
    shape, dtype = like.shape[::-1] if projection == "down" else like.shape, tensors[like.tensor].dtype
    if (view.shape, tensors[view.tensor].dtype) != (shape, dtype):
        kind = "down" if projection == "down" else "gate or up"
        raise error(
            f"{view.tensor}: expected {kind} {list(shape)} {dtype} to go with {like.tensor}, got "
            f"{list(view.shape)} {tensors[view.tensor].dtype}{remedy}"
        )


def _not_float(name: str, spec: TensorSpec) -> str:
    return f"{name}: expected expert weights in {', '.join(FLOATS)}, got {spec.dtype}; dequantise them to BF16 first"
