"""One group of experts of several codecs as a module: a base that all share, and a DersProjection for each codec.

    y = x @ W.T        of each expert by the projection of its codec, on that codec's short way where it has one

Parameters have their names on disk: `base`, `delta.<k>.<part>`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .dtypes import TORCH
from .forms import product
from .group import MixedGroup, RuntimeGroup
from .parts import Parts
from .projection import DersProjection, make_parts

Pieces = list[dict[str, Tensor]] | None


class MixedProjection(nn.Module):
    """y = x @ W.T for members 0..E-1 of a group, as DersProjection says. The base trains unless some deltas are exact."""

    no_delta = False

    def __init__(self, group: MixedGroup, device=None, dtype=None):
        super().__init__()
        self.group, self.delta = group, nn.Module()
        self.member_of = {expert: member for member, expert in enumerate(group.experts)}
        base = torch.empty(group.shape, dtype=dtype or TORCH[group.dtype], device=device)
        trains = not any(family.codec.lossless for family in group.families)
        self.base = nn.Parameter(base, requires_grad=trains)
        for k, family in enumerate(group.families):
            self.delta.add_module(str(k), make_parts(family, device, dtype))
        self._families = [_Family(self, k, family) for k, family in enumerate(group.families)]  # no submodules
        at = {expert: (f, i) for f in self._families for expert, i in f.member_of.items()}
        self._places = [at[expert] for expert in group.experts]

    def has_room(self) -> bool:
        """Whether the synthesised weights of all layers fit in the cache."""
        return all([family.has_room() for family in self._families])  # each of them is asked, and so counted

    def apart(self, x: Tensor, tokens: float, active: int) -> bool:
        """Whether base and deltas apart are the faster way for every codec; the base's product is made once for all."""
        return all(family.no_delta or family.apart(x, tokens, active) for family in self._families)

    def weight(self, member: int) -> Tensor:
        """[out, in] = base + delta in the base's dtype; no gradient goes through it."""
        family, place = self._places[member]
        return family.weight(place)

    def base_product(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out] = x @ B.T"""
        return product(x, self.base)

    def delta_products(self, x: Tensor, members: Sequence[int], counts: Sequence[int], pieces: Pieces = None) -> Tensor:
        """x @ D.T of some members' rows of x [pairs, in], one member's after the other's: [pairs, out]."""
        return self._by_family(DersProjection.delta_products, x, members, counts, pieces)

    def whole_products(self, x: Tensor, members: Sequence[int], counts: Sequence[int], pieces: Pieces = None) -> Tensor:
        """x @ W.T with the synthesised W, likewise."""
        return self._by_family(DersProjection.whole_products, x, members, counts, pieces)

    def pieces(self) -> list[dict[str, Tensor]]:
        """Every member's parts."""
        of_family = {id(family): family.pieces() for family in self._families}
        return [of_family[id(family)][place] for family, place in self._places]

    def differentiates(self, x: Tensor) -> bool:
        """Whether a product with x has to be differentiable."""
        return any([family.differentiates(x) for family in self._families])

    def mark(self) -> tuple:
        """Changes when parameters do."""
        return tuple(family.mark() for family in self._families)

    def train(self, mode: bool = True) -> "MixedProjection":
        for family in self._families:
            family.train(mode)
        return super().train(mode)

    def _by_family(
        self, run: Callable[..., Tensor], x: Tensor, members: Sequence[int], counts: Sequence[int], pieces: Pieces
    ) -> Tensor:
        """Each family's rows at once, and the results back in the order in which the rows came."""
        rows, results = x.split(list(counts)), [None] * len(members)
        for family in self._families:
            own = [i for i, member in enumerate(members) if self._places[member][0] is family]
            if not own:
                continue
            places, sizes = [self._places[members[i]][1] for i in own], [counts[i] for i in own]
            its_pieces = pieces and [pieces[self.member_of[expert]] for expert in family.group.experts]
            y = run(family, torch.cat([rows[i] for i in own]), places, sizes, its_pieces)
            for i, part in zip(own, y.split(sizes), strict=True):
                results[i] = part
        return torch.cat(results)


class _Family(DersProjection):
    """The members of one codec. Base and parts belong to the projection above, under their names on disk."""

    def __init__(self, owner: MixedProjection, number: int, group: RuntimeGroup):
        nn.Module.__init__(self)
        self.__dict__["_owner"], self._number = owner, str(number)  # no submodule of what is made of it
        self._begin(group)

    @property
    def base(self) -> nn.Parameter:
        return self._owner.base

    @property
    def delta(self) -> Parts:
        return self._owner.delta.get_submodule(self._number)
