"""The stock MoE that a dense model becomes, as names, shapes and a config.json, from the dense model's headers alone.

Fine-grained split (DeepSeekMoE, arXiv 2401.06066; Dynamic-DINO, arXiv 2507.17436): expert e becomes the m experts e*m ... e*m+m-1,
each with 1/m of the neurons. Router rows are repeated m times, so that the top k*m are the slices of the top k; the
gates, which sum to 1, are then 1/m of what they were, and down_proj is multiplied by m. (A model that computes its router in
bf16 finds two copies equally good for 1 to 5 of 1000 tokens, and may then take slices of both.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .architectures import ARCHITECTURES, PROJECTIONS, Storage
from .checkpoint.manifest import is_ders
from .checkpoint.reader import CheckpointReader
from .checkpoint.tensor import TensorSpec
from .errors import CheckpointError, UnsupportedError, UsageError
from .layouts import PER_LAYER, ExpertGroup, Layout, MatrixView, find_dense_layers, find_layout
from .pairs import PAIRS, Pair, find_pair, refuse_biases, stated
from .recipe import layer_test

MOST_EXPERTS = 4096  # of a layer, slices counted

Dense = dict[tuple[str, int], dict[str, MatrixView]]  # (stem, layer) -> FFN matrices of the dense model


@dataclass(frozen=True)
class Upcycling:
    """How a dense model becomes a MoE; ders.json keeps it under `upcycling`."""

    experts: int
    top_k: int
    layers: str = "all"
    split: int = 1
    router: str = "normal"
    prompts: str | None = None  # SHA-256 of the prompts that the router is fitted to
    noise: float = 0.0  # standard deviation of what is added to each copy, in root mean squares of its row
    average: bool = False  # the other weights are the mean of the fine-tunes', not the dense model's
    donors: tuple[str, ...] = ()
    per_layer: tuple[
        int, ...
    ] = ()  # experts by parts of the depth, as MoLA (arXiv 2402.08562) has 2-4-6-8; `experts` is the most

    @property
    def total(self) -> int:
        """Experts that the router sees in a layer, at most."""
        return self.experts * self.split

    def totals(self, layers: int) -> list[int]:
        """Experts that the router sees in each layer. Parts of the depth are contiguous, the later ones the longer."""
        parts = self.per_layer or (self.experts,)
        if len(parts) > layers:
            raise UsageError(f"--experts-per-layer: {len(parts)} numbers for {layers} layers")
        short, longer = divmod(layers, len(parts))
        lengths = [short] * (len(parts) - longer) + [short + 1] * longer
        return [count * self.split for count, length in zip(parts, lengths, strict=True) for _ in range(length)]

    def check(self) -> None:
        """Raise UsageError for settings that no model could have."""
        if not 1 <= self.top_k <= self.experts:
            raise UsageError(f"--top-k {self.top_k}: expected 1 ... {self.experts}, the number of experts")
        if self.total > MOST_EXPERTS:
            raise UsageError(
                f"--experts {self.experts} --split {self.split}: {self.total} experts; expected at most {MOST_EXPERTS}"
            )
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"--noise {self.noise}: expected a number of 0 or more")
        if self.split > 1 and self.router == "zero":
            raise UsageError(
                "--split with --router zero: all slices would tie, and the top ones be slices of no one expert"
            )


@dataclass(frozen=True)
class Blueprint:
    """The stock MoE. `chosen`: layers whose experts may differ."""

    pair: Pair
    dense: Dense
    chosen: frozenset[int]
    tensors: dict[str, TensorSpec]  # all of the MoE
    copied: dict[str, TensorSpec]  # those that are no experts
    made: dict[str, TensorSpec]  # of these, the ones that the dense model does not have: routers, and zeros
    config: dict[str, Any]
    layout: Layout
    groups: tuple[ExpertGroup, ...]


def draw_blueprint(reader: CheckpointReader, how: Upcycling) -> Blueprint:
    """Raises UnsupportedError for a model that has no such MoE, UsageError for settings that do not fit it."""
    _refuse_moe(reader)
    pair = find_pair(reader.config)
    if reader.config.get("quantization_config"):
        raise UnsupportedError(f"{reader.folder}: is quantised; dequantise it to bf16 first")
    stock = stated(pair, reader.config)
    refuse_biases(pair, reader.tensors)
    dense = find_dense_layers(reader.tensors)
    inner = _inner_size(reader, dense, how.split)
    chosen = frozenset(layer for _, layer in dense if layer_test(how.layers)(layer))
    if not chosen:
        raise UsageError(f"--layers {how.layers}: names none of the layers 0 ... {max(layer for _, layer in dense)}")
    config = _make_config(stock, pair, how, inner, [layer for _, layer in dense], chosen)
    storage = next(row for row in ARCHITECTURES if pair.moe in row.model_types).storages[0]
    experts: dict[str, TensorSpec] = {}
    made: dict[str, TensorSpec] = {}
    taken: set[str] = set()
    totals = how.totals(len(dense))
    for ((stem, layer), views), total in zip(dense.items(), totals, strict=True):
        if pair.dense_layers and layer not in chosen:
            continue
        where, dtype, hidden = f"{stem}.{layer}", reader.tensors[views["up"].tensor].dtype, views["up"].shape[1]
        taken |= {view.tensor for view in views.values()}
        experts |= _expert_tensors(where, storage, total, hidden, inner, dtype)
        made[f"{where}.{pair.router}"] = TensorSpec((total, hidden), dtype)
        sizes = {"E": total, "H": hidden, "I": inner}
        for name, shape in pair.zeros:
            made[f"{where}.{name}"] = TensorSpec(tuple(sizes.get(n, n) for n in shape), dtype)
    copied = {name: spec for name, spec in reader.tensors.items() if name not in taken} | made
    layout = find_layout(experts | copied, config)
    groups = tuple(part for group in layout.groups for part in _slices(group, how.split))
    return Blueprint(pair, dense, chosen, experts | copied, copied, made, config, layout, groups)


def _refuse_moe(reader: CheckpointReader) -> None:
    name = reader.config.get("model_type")
    if is_ders(reader.folder):
        raise UnsupportedError(f"{reader.folder}: is a DeRS checkpoint, so a MoE already; expected a dense model")
    if all(name != pair.dense for pair in PAIRS) and any(name in row.model_types for row in ARCHITECTURES):
        raise UnsupportedError(f"{reader.folder}: model_type {name!r:.60} has experts already; expected a dense model")


def _inner_size(reader: CheckpointReader, dense: Dense, split: int) -> int:
    """Neurons of an expert. Raises CheckpointError for an FFN whose matrices do not fit each other."""
    if not dense:
        raise CheckpointError(f"{reader.folder}: has no layers, such as model.layers.0.mlp.up_proj.weight")
    for views in dense.values():
        if set(views) != set(PROJECTIONS):
            raise UnsupportedError(f"{views['up'].tensor}: expected gate, up and down, found {' and '.join(views)}")
        inner, hidden = views["up"].shape
        specs = {projection: reader.tensors[view.tensor] for projection, view in views.items()}
        for projection, view in views.items():
            shape = (hidden, inner) if projection == "down" else (inner, hidden)
            if view.shape != shape or specs[projection].dtype != specs["up"].dtype:
                raise CheckpointError(
                    f"{view.tensor}: expected {specs['up'].dtype} {list(shape)} beside {views['up'].tensor}, "
                    f"found {specs[projection].dtype} {list(view.shape)}"
                )
    sizes = {views["up"].shape[0] for views in dense.values()}
    if len(sizes) != 1:
        raise UnsupportedError(f"{reader.folder}: FFNs of {sorted(sizes)} neurons; a MoE has experts of one size")
    size = sizes.pop()
    if size % split:
        raise UsageError(f"--split {split}: {size} neurons cannot be cut into {split} equal slices")
    return size // split


def _make_config(
    dense: dict[str, Any], pair: Pair, how: Upcycling, inner: int, layers: list[int], chosen: frozenset[int]
) -> dict[str, Any]:
    config = dense | {"model_type": pair.moe, "architectures": [pair.architecture]} | dict(pair.settings)
    config |= dict.fromkeys(pair.experts, how.total) | {pair.top_k: how.top_k * how.split, pair.inner: inner}
    if how.per_layer:
        config[PER_LAYER] = how.totals(len(layers))
    if pair.last_layer:
        config[pair.last_layer] = max(layers)
    if pair.dense_layers:
        config[pair.dense_layers] = [layer for layer in layers if layer not in chosen]
    config.pop("auto_map", None)  # names code of the dense class
    return config


def _expert_tensors(
    where: str, storage: Storage, total: int, hidden: int, inner: int, dtype: str
) -> dict[str, TensorSpec]:
    """Names and specs of a layer's experts, one matrix each or all in one tensor."""
    found = {}
    for projection, name in storage.names().items():
        rows, columns = (hidden, inner) if projection == "down" else (inner, hidden)
        if "{}" in name:
            found |= {f"{where}.{name.format(e)}": TensorSpec((rows, columns), dtype) for e in range(total)}
        else:
            fused = 2 if storage.fusion and projection != "down" else 1
            found[f"{where}.{name}"] = TensorSpec((total, fused * rows, columns), dtype)
    return found


def _slices(group: ExpertGroup, split: int) -> Iterator[ExpertGroup]:
    """The group; or, split, for each slice the experts that are it: they share a base, other slices have another."""
    parent, _, projection = group.name.rpartition(".")
    for s in range(split):
        name = f"{parent}.slice{s}.{projection}" if split > 1 else group.name
        yield replace(group, name=name, members=group.members[s::split])
