"""One group of experts as a module: a base that all share, and a light delta for each.

Parameters have their names on disk: `base`, `delta.<part>`; one tensor there is one parameter here. What is worked out
from them (columns, widened codes, synthesised weights) is no part of the state and is made anew when they change, as
autograd counts changes: one made through `.data` is seen after the next train() or eval().
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from ders_kernels.cpu_ops import blocks
from ders_kernels.deltas import Delta
from torch import Tensor, nn

from ..codecs.integers import IntCodec
from ..codecs.rank import RankCodec
from .cache import CACHE_BYTES, WeightCache
from .choice import choose, small
from .deltas import packed_delta
from .dtypes import TORCH
from .forms import Form, each, product
from .group import RuntimeGroup
from .lookups import Lookups
from .low_rank import LowRank
from .packed import Packed
from .parts import Parts
from .scattered import Scattered
from .synthesis import decode_delta, synthesize

WEIGHTS = WeightCache(CACHE_BYTES)  # of all layers


def short_form(group: RuntimeGroup) -> Form | None:
    """The short way of a group's delta products; None: D or W has to be made."""
    codec = group.codec
    if isinstance(codec, RankCodec):
        return LowRank()
    if isinstance(codec, IntCodec) and Lookups.fits(codec):
        return Lookups()
    if isinstance(codec, IntCodec) and Packed.fits(codec, group.shape):
        return Packed()
    return Scattered(codec) if Scattered.fits(codec) else None


def make_parts(group: RuntimeGroup, device=None, dtype=None) -> Parts:
    """The parameters of a group's delta; `dtype` is that of the base in memory, None: as stored."""
    specs = {name.removeprefix("delta."): spec for name, spec in group.parts.items() if name != "base"}
    trainable = form.trainable if (form := short_form(group)) else frozenset()
    # scales of 1e-8 and factors have no room in fp16: parts widen with the base, they never narrow
    return Parts(specs, trainable, device, dtype if dtype is torch.float32 else None)


class DersProjection(nn.Module):
    """y = x @ W.T for members 0..E-1 of a group, W = B + D_member [out, in].

    `dtype` is that of the base and of float parts in memory; None: as stored. The base trains, unless the deltas are
    exact: these are counted in steps from its bits. So do `left` and `right` of rank, `values` of drop, top, N:M and
    sparse. Integers, scales and what a chain adds don't.
    """

    def __init__(self, group: RuntimeGroup, device=None, dtype=None):
        super().__init__()
        base = torch.empty(group.shape, dtype=dtype or TORCH[group.dtype], device=device)
        self.base = nn.Parameter(base, requires_grad=not group.codec.lossless)
        self.delta = make_parts(group, device, dtype)
        self._begin(group)

    def _begin(self, group: RuntimeGroup) -> None:
        """All but the parameters."""
        self.group, self.form = group, short_form(group)
        self.member_of = {expert: member for member, expert in enumerate(group.experts)}
        self._made: dict[Hashable, tuple[Any, Any]] = {}
        self.has_room()  # asked now, so that the first layers to run know of the last ones

    def has_room(self) -> bool:
        """Whether the synthesised weights of all layers fit in the cache. Large ones of rank are never wanted there."""
        apart = isinstance(self.form, LowRank) and not small(self.group.shape)
        wanted = 0 if self.no_delta or apart else len(self.group.keys) * self.base.nbytes
        return WEIGHTS.has_room(self, wanted)

    @property
    def no_delta(self) -> bool:
        """A codec without parts: every member is the base."""
        return len(self.group.parts) == 1

    def apart(self, x: Tensor, tokens: float, active: int) -> bool:
        """Whether base and delta apart are the faster way for so many tokens of each active expert (choice.py)."""
        gradient, kept = self.differentiates(x), not self.training and self.has_room()
        form = self.form if self.form and self.form.runs(self, x, gradient) else None
        return choose(self.group.codec, form, self.group.shape, tokens, active, kept, gradient) == "apart"

    def weight(self, member: int) -> Tensor:
        """[out, in] = base + delta in the base's dtype; no gradient goes through it.

        Bit-equal to what `ders restore` writes if the parameters are in memory as stored.
        """
        with torch.no_grad():
            pieces, base = self._detached(member), self.base.detach()
            if self.no_delta:
                return base
            if self._wider_than_stored():
                return (base.float() + self.form.delta(self, member, pieces)).to(base.dtype)
            return synthesize(self.group, base, pieces, member)

    def kept_weight(self, member: int) -> Tensor:
        """`weight`, from the cache of all layers; while training it is made each time."""
        if self.training or self.no_delta:
            return self.weight(member)
        return WEIGHTS.get(self, member, self.mark(), lambda: self.weight(member))

    def base_product(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out] = x @ B.T"""
        return product(x, self.base)

    def delta_product(self, x: Tensor, member: int, pieces: Mapping[str, Tensor] | None = None) -> Tensor:
        """[T, in] -> [T, out] = x @ D.T; D isn't made where the codec has a form that runs.

        `pieces` are `pieces()[member]`, if the caller has them.
        """
        if self.no_delta:
            return x.new_zeros(x.shape[0], self.group.shape[0])
        if self.form and self.form.runs(self, x, self.differentiates(x)):
            return self.form.product(self, x, member, pieces)
        return self._dense_product(x, None, member, pieces)

    def whole_product(self, x: Tensor, member: int, pieces: Mapping[str, Tensor] | None = None) -> Tensor:
        """[T, in] -> [T, out] = x @ W.T with the synthesised W, which backward makes again instead of keeping it."""
        return self._dense_product(x, self.base, member, pieces)

    def delta_products(
        self, x: Tensor, members: Sequence[int], counts: Sequence[int], pieces: list[dict[str, Tensor]] | None = None
    ) -> Tensor:
        """`delta_product` of some members' rows of x [pairs, in], one member's after the other's: [pairs, out]."""
        gradient = self.differentiates(x)
        if self.form and not gradient and self.form.runs(self, x, gradient):
            return self.form.products(self, x, members, counts)
        return each(x, members, counts, lambda own, m: self.delta_product(own, m, pieces and pieces[m]))

    def whole_products(
        self, x: Tensor, members: Sequence[int], counts: Sequence[int], pieces: list[dict[str, Tensor]] | None = None
    ) -> Tensor:
        """`whole_product`, likewise. Where W is made in about the time of reading it, and not all have room, none is kept."""
        fast = isinstance(self.group.codec, IntCodec) and x.device.type == "cpu" and not self.has_room()
        if fast and not self.differentiates(x) and not torch.is_autocast_enabled("cpu"):
            return blocks.whole_products(x, self.base.detach(), self.packed(), members, counts)
        return each(x, members, counts, lambda own, m: self.whole_product(own, m, pieces and pieces[m]))

    def packed(self) -> Delta | None:
        """All members' parts as the kernels take them."""
        parts = {name: tensor.detach() for name, tensor in self.delta.tensors().items()}
        return packed_delta(self.group.codec, parts, self.group.shape[1], self.group.keys)

    def piece(self, member: int) -> dict[str, Tensor]:
        """One member's parts; a stream, which all members share, as it is."""
        return {name: t if self._shared(name) else t[member] for name, t in self.delta.tensors().items()}

    def pieces(self) -> list[dict[str, Tensor]]:
        """Every member's parts, unbound together: so are their gradients put together once, not for each member."""
        each: list[dict[str, Tensor]] = [{} for _ in self.group.keys]
        for name, tensor in self.delta.tensors().items():
            for own, piece in zip(each, [tensor] * len(each) if self._shared(name) else tensor.unbind(0), strict=True):
                own[name] = piece
        return each

    def differentiates(self, x: Tensor) -> bool:
        """Whether a product with x has to be differentiable."""
        tensors = (x, self.base, *self.delta.tensors().values())
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def made_once(self, member: Hashable, make: Callable[[], Any]) -> Any:
        """What a form works out from a member's parts, or from all; made again if a parameter that doesn't train has changed."""
        mark = self.mark(fixed=True)
        if (kept := self._made.get(member)) is None or kept[0] != mark:
            with torch.inference_mode(False), torch.no_grad():  # it may be needed for a gradient later
                kept = self._made[member] = (mark, make())
        return kept[1]

    def made_for_all(self, make: Callable[[], Any]) -> Any:
        """What is worked out from all members' parts; made again if any parameter has changed, or after train() or eval()."""
        mark = self.mark()
        if (kept := self._made.get(None)) is None or kept[0] != mark:
            kept = self._made[None] = (mark, make())
        return kept[1]

    def train(self, mode: bool = True) -> "DersProjection":
        """Also frees what was made from the parameters, but for the columns of entries that train."""
        self._made.pop(None, None)
        if not (self.form and self.form.trainable):
            self._made.clear()
        WEIGHTS.forget(self)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}

    def _dense_product(
        self, x: Tensor, base: Tensor | None, member: int, pieces: Mapping[str, Tensor] | None
    ) -> Tensor:
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x = x.to(kind)
        if not self.differentiates(x):
            return product(x, self._matrix(base is not None, member).to(kind))
        pieces = pieces or self.piece(member)
        names = tuple(sorted(self.form.trainable)) if self.form else ()
        return _DenseProduct.apply(x, base, self, member, names, *(pieces[name] for name in names))

    def _matrix(self, whole: bool, member: int) -> Tensor:
        """W in the base's dtype, or D fp32."""
        if whole:
            return self.kept_weight(member)
        pieces = self._detached(member)
        if self.group.codec.lossless:
            return self.weight(member).float() - self.base.detach().float()
        if self._wider_than_stored():
            return self.form.delta(self, member, pieces)
        return torch.from_numpy(decode_delta(self.group, pieces, member)).to(self.base.device)

    def _wider_than_stored(self) -> bool:
        """Whether parts that train have bits in memory that their stored dtype hasn't room for."""
        stored = {
            name: TORCH[self.group.parts[f"delta.{name}"].dtype] for name in (self.form.trainable if self.form else ())
        }
        return any(torch.promote_types(self.delta.get_parameter(n).dtype, s) != s for n, s in stored.items())

    def _shared(self, part: str) -> bool:
        return self.group.codec.lossless and part == "stream"

    def _detached(self, member: int) -> dict[str, Tensor]:
        return {name: piece.detach() for name, piece in self.piece(member).items()}

    def mark(self, fixed: bool = False) -> tuple:
        """Changes when parameters do; with `fixed`, those that don't train."""
        trained = self.form.trainable if self.form else frozenset()
        tensors = [t for name, t in self.delta.tensors().items() if not (fixed and name in trained)]
        tensors = tensors if fixed else [self.base, *tensors]
        return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


class _DenseProduct(torch.autograd.Function):
    """x [T, in] @ M.T with M = W (a base is given) or D. M is made again in backward: it would be kept for each expert."""

    @staticmethod
    def forward(ctx, x: Tensor, base: Tensor | None, projection: DersProjection, member: int, names: tuple, *trained):
        ctx.save_for_backward(x)
        ctx.projection, ctx.member, ctx.names, ctx.whole = projection, member, names, base is not None
        return product(x, projection._matrix(ctx.whole, member).to(x.dtype))

    @staticmethod
    def backward(ctx, g: Tensor):
        (x,), projection, gx, gbase = ctx.saved_tensors, ctx.projection, None, None
        g = g.to(x.dtype)
        if ctx.needs_input_grad[0]:
            gx = g @ projection._matrix(ctx.whole, ctx.member).to(x.dtype)
        if not any(ctx.needs_input_grad[1:]):
            return gx, None, None, None, None, *[None] * len(ctx.names)
        gm = g.T @ x
        if ctx.needs_input_grad[1]:
            gbase = gm.to(projection.base.dtype)
        pieces = projection._detached(ctx.member)
        grads = projection.form.gradients(projection, ctx.member, pieces, gm.float()) if ctx.names else {}
        return gx, gbase, None, None, None, *(grads[name].to(pieces[name].dtype) for name in ctx.names)
