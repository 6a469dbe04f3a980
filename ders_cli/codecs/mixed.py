"""Several codecs in one group: which of them stands for which expert, and what their parts are called.

One codec for all experts has the parts `delta.<part>`, each with an axis of all of them in front. Of several, the k-th in order
of first use has the parts `delta.<k>.<part>`, with an axis of *its* experts in front, in the order of the group. So an
expert's parts are the same bytes whatever codecs the others have. As JSON:

    {"codec": "mixed", "codecs": [the JSON of each], "of": [k of the first expert, k of the second, ...]}
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .base import DeltaCodec


@dataclass(frozen=True)
class Family:
    """The members of a group that have one codec."""

    codec: DeltaCodec
    prefix: str  # of its parts, behind the group's name: "delta." or "delta.<k>."
    members: Sequence[int]  # ascending


@dataclass(frozen=True)
class MixedCodec:
    """What stands for a group whose experts have several codecs: `codecs`, and which of them each member has."""

    codecs: tuple[DeltaCodec, ...]
    of: tuple[int, ...]

    @property
    def config(self) -> dict[str, Any]:
        return {"codec": "mixed", "codecs": [codec.config for codec in self.codecs], "of": list(self.of)}

    @property
    def lossless(self) -> bool:
        """Some of the experts are stored losslessly: in chunks, in which the group has to be read."""
        return any(codec.lossless for codec in self.codecs)

    def block_rows(self, shape: tuple[int, int]) -> int | None:
        """Rows of a block that every codec can divide into its own, or None: any number."""
        wanted = [rows for codec in self.codecs if (rows := codec.block_rows(shape)) is not None]
        return min(shape[0], math.lcm(*wanted)) if wanted else None

    @cached_property
    def families(self) -> tuple[Family, ...]:
        members: list[list[int]] = [[] for _ in self.codecs]
        for member, k in enumerate(self.of):
            members[k].append(member)
        each = enumerate(zip(self.codecs, members, strict=True))
        return tuple(Family(codec, f"delta.{k}.", tuple(own)) for k, (codec, own) in each)

    @cached_property
    def places(self) -> dict[int, tuple[Family, int]]:
        return {member: (family, place) for family in self.families for place, member in enumerate(family.members)}


GroupCodec = DeltaCodec | MixedCodec  # what stands for a group


def mixed(codecs: Sequence[DeltaCodec]) -> GroupCodec:
    """What stands for a group whose members have these codecs, one each."""
    number = {codec: k for k, codec in enumerate(dict.fromkeys(codecs))}
    return codecs[0] if len(number) == 1 else MixedCodec(tuple(number), tuple(number[codec] for codec in codecs))


def families(codec: GroupCodec, members: int) -> tuple[Family, ...]:
    """The families of a group of so many members, in order of first use."""
    return codec.families if isinstance(codec, MixedCodec) else (Family(codec, "delta.", range(members)),)


def family_of(codec: GroupCodec, members: int, member: int) -> tuple[Family, int]:
    """The family of one member, and its number in it."""
    return codec.places[member] if isinstance(codec, MixedCodec) else (families(codec, members)[0], member)
