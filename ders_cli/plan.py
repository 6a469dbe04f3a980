"""From headers alone: every unit of work, every output file and every byte in it.

Output tensors stand in natural order of their names and fill shards up to a size, so the shards do not depend on how
the source was sharded. Only the stream of the `exact` codec has no size beforehand; a plan holds its upper bound.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from .base import Base
from .checkpoint.manifest import file_names
from .checkpoint.tensor import TensorSpec
from .checkpoint.writer import reserved_header_bytes
from .codecs.mixed import GroupCodec, families, mixed
from .errors import UnsupportedError
from .layouts import ExpertGroup
from .recipe import Recipe
from .source import BLOCK_WEIGHTS, Source, stored_parts

GUARD_TEXT = b"This is a DeRS checkpoint: experts are stored as one base and deltas. Load it with ders (pip install ders-cli), or run `ders restore` first."
WORKING_SET = 48 << 20  # a thread's blocks, beside what the experts' rows take


@dataclass(frozen=True)
class Unit:
    """One group to convert, and what will stand for it."""

    group: ExpertGroup
    codec: GroupCodec
    parts: dict[str, TensorSpec | None]


@dataclass
class ShardPlan:
    """One output file: tensors of known size in order, then those that are appended."""

    file: str = ""
    fixed: dict[str, TensorSpec] = field(default_factory=dict)
    appended: list[str] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)

    @property
    def slices(self) -> dict[str, int]:
        """Tensors that are hashed expert by expert: the number of experts in each."""
        return {
            name: spec.shape[0]
            for unit in self.units
            for name, spec in unit.parts.items()
            if spec and ".delta." in name
        }

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the file without its appended streams, header included."""
        return 8 + reserved_header_bytes(self.fixed, self.appended) + sum(s.nbytes for s in self.fixed.values())


@dataclass(frozen=True)
class Plan:
    units: tuple[Unit, ...]
    copied: tuple[str, ...]
    shards: tuple[ShardPlan, ...]
    expert_bytes: int  # of all experts in the source
    stream_bound: int  # most that the appended streams can take

    @property
    def weight_bytes(self) -> int:
        """Bytes of the output's weight files, streams aside."""
        return sum(shard.fixed_bytes for shard in self.shards)

    def peak_memory(self, jobs: int) -> int:
        """Estimate of anonymous memory above an idle process, in bytes."""
        return max(jobs * max((unit_memory(unit) for unit in self.units), default=0), jobs * WORKING_SET)


def natural(name: str) -> tuple[object, ...]:
    """Sort key that puts layer 10 after layer 9."""
    return tuple(int(part) if number % 2 else part for number, part in enumerate(re.split(r"(\d+)", name)))


def unit_memory(unit: Unit) -> int:
    """Bytes that converting one group holds at once: its experts' rows, and fp32 copies of one expert's."""
    rows, width = (
        unit.codec.block_rows(unit.group.shape) or max(1, BLOCK_WEIGHTS // unit.group.shape[1]),
        unit.group.shape[1],
    )
    return WORKING_SET + 12 * 4 * rows * width


def make_plan(source: Source, recipe: Recipe, base: Base | None, max_shard_bytes: int) -> Plan:
    """Check every group and lay out the output. `base` is None where the source is a DeRS checkpoint with its own."""
    recipe.check_experts(source.groups)
    units, items = [], []
    for group in source.groups:
        if base is not None:
            base.check(group)
        unit = Unit(group, source.codec_of(group) or mixed(recipe.codecs(group)), {})
        unit.parts.update(stored_parts(group, unit.codec))
        units.append(unit)
        items.append((natural(group.name), unit))
    guard = TensorSpec((len(GUARD_TEXT),), "U8")
    items += [(natural(name), ("guard", name, guard)) for name in source.guards]
    items += [(natural(name), ("copied", name, spec)) for name, spec in source.copied.items()]
    names = [*source.guards, *source.copied, *(name for unit in units for name in unit.parts)]
    if len(set(names)) != len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise UnsupportedError(f"{twice}: the source has a tensor of the name that the DeRS format would give")
    shards = fill_shards([item for _, item in sorted(items, key=lambda pair: pair[0])], max_shard_bytes)
    expert_bytes = sum(TensorSpec(g.shape, g.dtype).nbytes * len(g.members) for g in source.groups)
    bound = sum(_stream_bound(unit) for unit in units)
    return Plan(tuple(units), tuple(source.copied), shards, expert_bytes, bound)


def _stream_bound(unit: Unit) -> int:
    """Most bytes of a unit's stream: the stored bits, and one byte for every chunk."""
    shape, bound = unit.group.shape, 0
    for family in families(unit.codec, len(unit.group.members)):
        if family.codec.lossless:
            chunks = -(-shape[0] // family.codec.block_rows(shape))
            bound += len(family.members) * (TensorSpec(shape, unit.group.dtype).nbytes + chunks)
    return bound


def _item_bytes(item: Unit | tuple[str, str, TensorSpec]) -> int:
    if not isinstance(item, Unit):
        return item[2].nbytes
    known = sum(spec.nbytes for spec in item.parts.values() if spec)
    streamed = [f for f in families(item.codec, len(item.group.members)) if f.codec.lossless]
    one = TensorSpec(item.group.shape, item.group.dtype).nbytes
    return known + one * sum(len(family.members) for family in streamed)


def fill_shards(items: list[Unit | tuple[str, str, TensorSpec]], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """Items in order, a new shard where the next one would pass the size. A group is never split."""
    shards, held = [ShardPlan()], 0
    for item in items:
        size = _item_bytes(item)
        if held and held + size > max_shard_bytes:
            shards.append(ShardPlan())
            held = 0
        held += size
        shard = shards[-1]
        if isinstance(item, Unit):
            shard.units.append(item)
            shard.fixed |= {name: spec for name, spec in item.parts.items() if spec}
            shard.appended += [name for name, spec in item.parts.items() if spec is None]
        else:
            kind, name, spec = item
            (shard.guards if kind == "guard" else shard.copied).append(name)
            shard.fixed[name] = spec
    for shard, file in zip(shards, file_names(len(shards)), strict=True):
        shard.file = file
    return tuple(shards)
