"""The two elementwise steps of a layer whose bases and deltas were multiplied apart (method, section 4).

h_k = act(x Bg' + x Dg_k') * (x Bu' + x Du_k')  and  m = sum_k g_k h_k          `activate`
y   = m Bd' + sum_k g_k (h_k Dd_k')                                            `combine`
"""

import triton
import triton.language as tl

from .config import Case, Config
from .tiles import narrow

CONFIG = Config(1, 1024, 0, 4, 1)


@triton.jit
def activated(value, NAME: tl.constexpr):
    """fp32, by the names of reference.ACTIVATIONS."""
    if NAME == "silu":
        return value / (1 + tl.exp(-value))
    elif NAME == "gelu":
        return 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        return value / (1 + tl.exp(-2 * inner))  # 1 + tanh(z) = 2 / (1 + exp(-2z))
    else:
        return tl.maximum(value, 0)


@triton.jit
def split_sum(parts, splits, pairs, pair, width, row, there, ROWS: tl.constexpr):
    """Row `pair` of parts [splits, pairs, width], summed over splits."""
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(0, splits):
        at = parts + (tl.zeros((), tl.int64) + split) * pairs * width + pair * width + row
        total += tl.load(at, mask=there, other=0)
    return total


@triton.jit
def activate(
    gate_base, gate_pairs, up_base, up_pairs, index, gates, hidden, mixed, inner, experts, k, gate_splits, up_splits,
    NAME: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """*_base [T, inner] plus *_pairs fp32 [splits, T * k, inner], 0 splits where all experts are the base; index int64
    [T, k], gates [T, k] -> hidden [T * k, inner], mixed [T, inner].

    A program has one token and ROWS of its columns. Pairs whose expert isn't there add nothing.
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < inner
    up_once = tl.load(up_base + token * inner + row, mask=inside, other=0).to(tl.float32)
    gate_once = up_once
    if GATED:
        gate_once = tl.load(gate_base + token * inner + row, mask=inside, other=0).to(tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for place in range(0, k):
        pair = token * k + place
        expert = tl.load(index + pair)
        there = inside & (expert >= 0) & (expert < experts)
        up = up_once + split_sum(up_pairs, up_splits, tl.num_programs(0) * k, pair, inner, row, there, ROWS)
        gate = gate_once
        if GATED:
            gate += split_sum(gate_pairs, gate_splits, tl.num_programs(0) * k, pair, inner, row, there, ROWS)
        value = activated(gate, NAME) * up if GATED else activated(up, NAME)
        tl.store(hidden + pair * inner + row, narrow(value, hidden.dtype.element_ty), mask=there)
        total += tl.where(there, tl.load(gates + pair).to(tl.float32) * value, 0)
    tl.store(mixed + token * inner + row, narrow(total, mixed.dtype.element_ty), mask=inside)


@triton.jit
def combine(base, pairs, index, gates, y, out, experts, k, splits, ROWS: tl.constexpr):
    """base [T, out], pairs fp32 [splits, T * k, out] -> y [T, out] = base + the token's sum of gate * pair."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < out
    total = tl.load(base + token * out + row, mask=inside, other=0).to(tl.float32)
    for place in range(0, k):
        pair = token * k + place
        expert = tl.load(index + pair)
        there = inside & (expert >= 0) & (expert < experts)
        value = split_sum(pairs, splits, tl.num_programs(0) * k, pair, out, row, there, ROWS)
        total += tl.where(there, tl.load(gates + pair).to(tl.float32) * value, 0)
    tl.store(y + token * out + row, narrow(total, y.dtype.element_ty), mask=inside)


_ROUTED = {"index": "i64", "gates": "bf16"}
_STEP = {"ROWS": CONFIG.rows}
CASES = (
    *(
        Case(
            f"activation {name}",
            activate,
            CONFIG,
            _ROUTED
            | {"gate_base": "bf16", "up_base": "bf16", "gate_pairs": "fp32", "up_pairs": "fp32"}
            | {"hidden": "bf16", "mixed": "bf16"},
            _STEP | {"NAME": name, "GATED": True},
            dots=False,
        )
        for name in ("silu", "gelu", "gelu_tanh", "relu")
    ),
    Case(
        "sum over experts", combine, CONFIG, _ROUTED | {"base": "bf16", "pairs": "fp32", "y": "bf16"}, _STEP, dots=False
    ),
)
