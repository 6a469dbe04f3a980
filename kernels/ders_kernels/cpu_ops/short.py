"""x @ D.T without making D: which deltas have a short way here, and that way for all pairs of a layer.

int1, int2        lookups (tables.py) where the processor has them, else as the other integers
int8 ... int3     torch's 4-bit kernel (four_bits.py)
LowRank           two small products (rank_products.py, from FEW pairs of an expert on by torch)
Kept              a sparse matrix (scattered.py)
Sum               both, added
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..deltas import Delta, Drawn, Ints, Kept, LowRank, Sum
from . import decode, four_bits, rank_products, scattered, tables

FEW_KEPT = 0.025  # share up to which the sparse product wins at any number of pairs
FEW = 4  # pairs of an expert up to which one compiled call beats torch's two products (rank 16 and 64, [5632, 2048])


def refuses(delta: Delta, dtype: torch.dtype) -> str:
    """Why x of this dtype @ D.T has no short way here, "" if it has one."""
    if isinstance(delta, Ints):
        if dtype != torch.bfloat16:
            return f"codes meet bf16 inputs, not {dtype}"
        return tables.refuses(delta.bits, delta.group) and four_bits.refuses(delta.group, delta.shape[1])
    if isinstance(delta, Kept):
        dense = delta.kept > scattered.DENSITY * delta.width
        return f"{delta.kept} of {delta.width} entries are too many for a sparse matrix" if dense else ""
    if isinstance(delta, Sum):
        return refuses(delta.first, dtype) or refuses(delta.then, dtype)
    return "" if isinstance(delta, LowRank) else f"no kernel for {type(delta).__name__}"


def pays(delta: Delta, dtype: torch.dtype, tokens: float) -> bool:
    """Whether there is a short way that beats decoding; tokens: the mean number of an expert that has any."""
    return not refuses(delta, dtype) and tokens <= _many(delta)


def _many(delta: Delta) -> float:
    """Tokens of an expert from which decoding D or W costs less ([5632, 2048], two cores)."""
    if isinstance(delta, Ints):
        return 64 if delta.bits == 1 else 24 if delta.bits <= 4 else 12
    if isinstance(delta, Sum):
        return min(_many(delta.first), _many(delta.then))
    # a draw for each weight makes decoding of `drop` cost 45 ms
    if isinstance(delta, LowRank) or delta.kept <= FEW_KEPT * delta.width or isinstance(delta.positions, Drawn):
        return math.inf
    return 64


def products(x: Tensor, delta: Delta, experts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """x [pairs, in], experts and counts as in pairs.py -> x_p @ D_e.T [pairs, out] in x's dtype."""
    if isinstance(delta, Ints) and not tables.refuses(delta.bits, delta.group):
        return tables.products(x, delta.once("tables", lambda: tables.arrange(delta)), experts, counts)
    if isinstance(delta, Ints):
        return each(x, experts, counts, lambda own, e: four_bits.product(own, _packed(delta, e)))
    if isinstance(delta, LowRank):
        return low_rank(x, delta.left, delta.right, experts, counts)
    if isinstance(delta, Kept):
        return each(x, experts, counts, lambda own, e: scattered.product(own, _sparse(delta, e)))
    both = [products(x, part, experts, counts).float() for part in (delta.first, delta.then)]
    return (both[0] + both[1]).to(x.dtype)


def low_rank(x: Tensor, left: Tensor, right: Tensor, experts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """left [E, out, r], right [E, r, in], of x's dtype or wider"""
    if max(counts, default=0) <= FEW and all(t.dtype == torch.bfloat16 for t in (x, left, right)):
        return rank_products.products(x, left, right, experts, counts)
    return each(x, experts, counts, lambda own, e: own @ right[e].T.to(x.dtype) @ left[e].T.to(x.dtype))


def each(x: Tensor, experts: Sequence[int], counts: Sequence[int], product: Callable[[Tensor, int], Tensor]) -> Tensor:
    """product(an expert's rows of x, the expert) -> [pairs, out], one expert after the other."""
    parts = [product(own, e) for own, e in zip(x.split(list(counts)), experts, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _packed(delta: Ints, expert: int) -> four_bits.FourBits:
    return delta.once(("four bits", expert), lambda: four_bits.pack(delta, expert))


def _sparse(delta: Kept, expert: int) -> Tensor:
    return delta.once(("sparse", expert), lambda: _make_sparse(delta, expert))


def _make_sparse(delta: Kept, expert: int) -> Tensor:
    (_, out, width), (at, used) = delta.shape, scattered.positions(delta, expert)
    if isinstance(delta.values, Ints):
        values = torch.from_numpy(decode.rows(delta.values, expert, 0, out))
    else:
        values = delta.values[expert].detach()
    return scattered.matrix(at, values.reshape(-1) if used is None else values[used], (out, width))
