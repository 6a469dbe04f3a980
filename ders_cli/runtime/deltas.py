"""A group's parts, as they are on disk, as the packed delta that the kernels take; nothing is copied."""

from collections.abc import Mapping

from ders_kernels.deltas import Bitmap, Delta, Drawn, EliasFano, Ints, Kept, LowRank, Sum
from torch import Tensor

from ..codecs import DeltaCodec
from ..codecs.base import SelectiveCodec
from ..codecs.chain import ChainCodec
from ..codecs.drop import DropCodec
from ..codecs.integers import IntCodec
from ..codecs.rank import RankCodec
from ..codecs.ternary import TernaryCodec

Tensors = Mapping[str, Tensor]


def packed_delta(codec: DeltaCodec, parts: Tensors, width: int, keys: tuple[int, ...]) -> Delta | None:
    """Parts [E, ...] by name, `in`, the experts' generator keys -> their delta; None where there are no kernels.

    Those are `none`, `exact` (its deltas are counted in steps of the dtype, not added), `sparse`, and what follows a chain
    whose kept values are not coded as integers.
    """
    if isinstance(codec, IntCodec):
        return Ints(parts["codes"], parts["scale"], codec.bits, codec.group_size, width)
    if isinstance(codec, RankCodec):
        return LowRank(parts["left"], parts["right"])
    if isinstance(codec, TernaryCodec):
        # a set bit is a minus sign: (1 - 2c) s = (2c - 1)(-s), 1-bit codes with the scale's sign turned
        signs = Ints(parts["negative"], -parts["scale"], 1, codec.slots(width), codec.slots(width))
        return Kept(EliasFano(parts.get("low"), parts["high"]), signs, width)
    if isinstance(codec, SelectiveCodec):
        return Kept(_positions(codec, parts, keys), parts["values"], width)
    if isinstance(codec, ChainCodec):
        return _chain(codec, parts, width, keys)
    return None


def _positions(codec: SelectiveCodec, parts: Tensors, keys: tuple[int, ...]) -> Drawn | Bitmap | EliasFano:
    if isinstance(codec, DropCodec):
        return Drawn(keys)
    return Bitmap(parts["bitmap"]) if "bitmap" in parts else EliasFano(parts.get("low"), parts["high"])


def _chain(codec: ChainCodec, parts: Tensors, width: int, keys: tuple[int, ...]) -> Delta | None:
    inner = {name.removeprefix("then."): part for name, part in parts.items() if name.startswith("then.")}
    if isinstance(codec.first, SelectiveCodec):
        if not isinstance(codec.then, IntCodec):
            return None
        values = packed_delta(codec.then, inner, codec.first.kept(width), keys)
        return Kept(_positions(codec.first, parts, keys), values, width)
    own = {name: part for name, part in parts.items() if not name.startswith("then.")}
    first = packed_delta(codec.first, own, width, keys)
    then = packed_delta(codec.then, inner, width, tuple((key + 1) % 2**64 for key in keys))
    return first and then and Sum(first, then)
