"""What a module needs to know of a group of experts: names and shapes from headers and ders.json, no weights."""

from collections import defaultdict
from dataclasses import dataclass

from ders_kernels.counter_rng import make_key

from ..checkpoint.tensor import TensorSpec
from ..codecs import DeltaCodec
from ..errors import UnsupportedError
from ..layouts import ExpertGroup
from ..source import DersSource


@dataclass(frozen=True)
class RuntimeGroup:
    """The [out, in] matrices of one projection that share a base."""

    name: str  # "model.layers.3.mlp.experts.gate_proj", or with fine-grained slices "...experts.slice1.gate_proj"
    projection: str  # gate | up | down
    shape: tuple[int, int]
    dtype: str  # BF16 | F16 | F32, as stored
    codec: DeltaCodec
    keys: tuple[int, ...]  # generator key of each member
    experts: tuple[int, ...]  # numbers that the router gives the members
    parts: dict[str, TensorSpec]  # "base" and "delta.<part>" as on disk: [E, ...], but a stream has no such axis

    @property
    def module(self) -> str:
        """Path of the experts module: "model.layers.3.mlp.experts"."""
        return split_name(self.name)[0]

    @property
    def slice(self) -> str:
        """ "slice1", or "" where experts are not sliced."""
        return split_name(self.name)[1]


def split_name(name: str) -> tuple[str, str]:
    """Name of a group -> (path of the experts module, slice or "")."""
    path = name.rpartition(".")[0]
    above, _, last = path.rpartition(".")
    return (above, last) if last.startswith("slice") and last[5:].isdigit() else (path, "")


def runtime_groups(source: DersSource) -> dict[str, list[RuntimeGroup]]:
    """{path of the experts module: its groups}; slices belong to the module above them.

    Raises UnsupportedError if a shared expert is among the members: no router gives it.
    """
    modules: dict[str, list[RuntimeGroup]] = defaultdict(list)
    for group in source.groups:
        made = _runtime_group(source, group)
        modules[made.module].append(made)
    return dict(modules)


def _runtime_group(source: DersSource, group: ExpertGroup) -> RuntimeGroup:
    labels = [label for label, _ in group.members]
    if not all(label.isdecimal() for label in labels):
        raise UnsupportedError(
            f"{group.name}: the shared expert is a member of this group and cannot run packed; "
            "load dequantised, or compress without the shared expert"
        )
    prefix = len(group.name) + 1
    return RuntimeGroup(
        name=group.name,
        projection=group.projection,
        shape=group.shape,
        dtype=group.dtype,
        codec=source.codecs[group.name],
        keys=tuple(make_key(source.seed, group.name, label) for label in labels),
        experts=tuple(int(label) for label in labels),
        parts={name[prefix:]: spec for name, spec in source.part_specs(group).items()},
    )
