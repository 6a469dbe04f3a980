"""What a module needs to know of a group of experts: names and shapes from headers and ders.json, no weights."""

from collections import defaultdict
from dataclasses import dataclass

from ders_kernels.counter_rng import make_key

from ..checkpoint.tensor import TensorSpec
from ..codecs import DeltaCodec
from ..codecs.mixed import Family, MixedCodec, families
from ..errors import UnsupportedError
from ..layouts import ExpertGroup
from ..source import DersSource


class _Named:
    """What follows from a group's name."""

    name: str

    @property
    def module(self) -> str:
        """Path of the experts module: "model.layers.3.mlp.experts"."""
        return split_name(self.name)[0]

    @property
    def slice(self) -> str:
        """ "slice1", or "" where experts are not sliced."""
        return split_name(self.name)[1]


@dataclass(frozen=True)
class RuntimeGroup(_Named):
    """The [out, in] matrices of one projection that share a base and a codec."""

    name: str  # "model.layers.3.mlp.experts.gate_proj", or with fine-grained slices "...experts.slice1.gate_proj"
    projection: str  # gate | up | down
    shape: tuple[int, int]
    dtype: str  # BF16 | F16 | F32, as stored
    codec: DeltaCodec
    keys: tuple[int, ...]  # generator key of each member
    experts: tuple[int, ...]  # numbers that the router gives the members
    parts: dict[str, TensorSpec]  # "base" and "delta.<part>" as on disk: [E, ...], but a stream has no such axis


@dataclass(frozen=True)
class MixedGroup(_Named):
    """The matrices of one projection that share a base and have several codecs: a group for each codec, of one base.

    Part `delta.<part>` of family k is `delta.<k>.<part>` on disk.
    """

    families: tuple[RuntimeGroup, ...]
    experts: tuple[int, ...]  # of all families, as the members stand on disk

    @property
    def name(self) -> str:
        return self.families[0].name

    @property
    def projection(self) -> str:
        return self.families[0].projection

    @property
    def shape(self) -> tuple[int, int]:
        return self.families[0].shape

    @property
    def dtype(self) -> str:
        return self.families[0].dtype


def split_name(name: str) -> tuple[str, str]:
    """Name of a group -> (path of the experts module, slice or "")."""
    path = name.rpartition(".")[0]
    above, _, last = path.rpartition(".")
    return (above, last) if last.startswith("slice") and last[5:].isdigit() else (path, "")


def runtime_groups(source: DersSource) -> dict[str, list[RuntimeGroup | MixedGroup]]:
    """{path of the experts module: its groups}; slices belong to the module above them.

    Raises UnsupportedError if a shared expert is among the members: no router gives it.
    """
    modules: dict[str, list[RuntimeGroup | MixedGroup]] = defaultdict(list)
    for group in source.groups:
        made = _runtime_group(source, group)
        modules[made.module].append(made)
    return dict(modules)


def _runtime_group(source: DersSource, group: ExpertGroup) -> RuntimeGroup | MixedGroup:
    labels = [label for label, _ in group.members]
    if not all(label.isdecimal() for label in labels):
        raise UnsupportedError(
            f"{group.name}: the shared expert is a member of this group and cannot run packed; "
            "load dequantised, or compress without the shared expert"
        )
    codec, specs = source.codecs[group.name], source.part_specs(group)
    made = tuple(_of_family(source, group, family, specs) for family in families(codec, len(labels)))
    return MixedGroup(made, tuple(map(int, labels))) if isinstance(codec, MixedCodec) else made[0]


def _of_family(source: DersSource, group: ExpertGroup, family: Family, specs: dict[str, TensorSpec]) -> RuntimeGroup:
    labels, prefix = [group.members[member][0] for member in family.members], f"{group.name}.{family.prefix}"
    own = {f"delta.{part}": specs[f"{prefix}{part}"] for part in family.codec.spec(group.shape)}
    return RuntimeGroup(
        name=group.name,
        projection=group.projection,
        shape=group.shape,
        dtype=group.dtype,
        codec=family.codec,
        keys=tuple(make_key(source.seed, group.name, label) for label in labels),
        experts=tuple(int(label) for label in labels),
        parts={"base": specs[f"{group.name}.base"]} | own,
    )
