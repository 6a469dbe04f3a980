"""1- and 2-bit codes at few tokens: x @ D.T by looking up sums of inputs, four weights (two of 2 bits) at a time.

Four bits of a row's codes are the signs of four inputs, x_0 ... x_3, so their sum is one of 16 numbers. They are worked out
once for all rows:

    table[n] = sum_j level(bits j of n) * x_j        level = 2c - 1 (1 bit) or c - 1.5 (2 bits)

and AVX-512 has an instruction that looks 16 numbers up in a register of 16. So a lookup and an addition do for 16 rows what
takes 64 multiplications, and codes are read as they are stored: 1 or 2 bits, not 4. Sums are fp32, of a group first, then
times its scale. The idea is T-MAC's (arXiv 2407.00088), there with 8-bit tables.

Codes of 64 rows stand side by side, a 32-bit word of each: words [E, out / 64, words of a row, 64].
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..deltas import Ints
from ..jit import njit
from .floats import bf16_bits
from .pairs import of_pairs
from .threads import share

ROWS, LANES = 64, 16
PREFETCH = 64  # vectors of words ahead: 4 kB, found by trying
THREAD_LOOKUPS = 1 << 17  # what a thread must have to do (0.1 ms), for waking it takes half of that
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_HALVES = ir.VectorType(ir.IntType(16), LANES)
# levels[bits][j, n]: what input j of four bits n is multiplied by
_LEVELS = {
    1: np.array([[2 * (n >> j & 1) - 1 for n in range(16)] for j in range(4)], np.float32),
    2: np.array([[(n >> 2 * j & 3) - 1.5 for n in range(16)] for j in range(2)], np.float32),
}


class Tables(NamedTuple):
    """words int32 [E, blocks, words of a row, 64]; scales bf16 [E, blocks, groups, 64]; the shape that they stand for."""

    words: Tensor
    scales: Tensor
    bits: int
    group: int
    out: int


def refuses(bits: int, group: int) -> str:
    """Why there are no lookups for such codes here, "" if there are."""
    if bits not in _LEVELS or group * bits % 32:
        return f"lookups take 1 or 2 bits and groups of whole 32-bit words, not int{bits} in groups of {group}"
    return "" if _has_lookups() else "lookups need a processor with AVX-512"


@cache
def _has_lookups() -> bool:
    # numba may have been told to compile for less than this processor
    told = os.environ.get("NUMBA_CPU_NAME", "") or os.environ.get("NUMBA_CPU_FEATURES", "")
    return not told and bool(binding.get_host_cpu_features().get("avx512f"))


def arrange(delta: Ints) -> Tables:
    """Codes and scales of all experts in the order that `products` reads; as large as they are."""
    experts, out, _ = delta.shape
    codes = torch.nn.functional.pad(delta.codes, (0, -delta.codes.shape[2] % 4, 0, -out % ROWS))
    scales = torch.nn.functional.pad(delta.scale.to(torch.bfloat16), (0, 0, 0, -out % ROWS))

    def side_by_side(rows: Tensor) -> Tensor:
        return rows.reshape(experts, -1, ROWS, rows.shape[2]).transpose(2, 3).contiguous()

    # a row's bytes are its 32-bit words, lowest byte first
    return Tables(side_by_side(codes.view(torch.int32)), side_by_side(scales), delta.bits, delta.group, out)


def products(x: Tensor, made: Tables, experts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """x bf16 [pairs, in], experts and counts as in pairs.py -> x_p @ D_e.T, bf16 [pairs, out]."""
    width = made.words.shape[2] * 32 // made.bits
    wide = torch.nn.functional.pad(x.float(), (0, width - x.shape[1])).contiguous().numpy()
    table = torch.empty(x.shape[0], width * made.bits // 4, LANES).numpy()
    _fill(wide, _LEVELS[made.bits], table)
    numbers, starts = of_pairs(experts, counts)
    out = torch.empty(x.shape[0], made.out, dtype=torch.bfloat16)
    words, scales = made.words.view(torch.uint32).numpy(), made.scales.view(torch.uint16).numpy()
    bits = out.view(torch.uint16).numpy()
    words_a_group = made.group * made.bits // 32

    def some(first: int, last: int) -> None:
        _products(words, scales, table, words_a_group, numbers, starts, first, last, bits)

    lookups = x.shape[0] * (words[0].size * 8 // LANES)
    share(some, len(numbers) * words.shape[1], lookups // THREAD_LOOKUPS)
    return out


@njit(nogil=True, cache=True)
def _fill(x, levels, table):
    """fp32 [T, in], [4 / bits, 16] -> [T, in * bits / 4, 16]"""
    inputs = levels.shape[0]
    for t in range(table.shape[0]):
        for i in range(table.shape[1]):
            line = table[t, i]
            for n in range(16):
                line[n] = levels[0, n] * x[t, i * inputs]
            for j in range(1, inputs):
                for n in range(16):
                    line[n] += levels[j, n] * x[t, i * inputs + j]


@intrinsic
def _add_group(_, words, table, count, scales, total):
    """total fp32 [64] += scale [64] * (sum over `count` words of the numbers that their bits look up); addresses."""

    def generate(context, builder, signature, args):
        words, table, scales, total = (
            builder.inttoptr(args[i], vector.as_pointer())
            for i, vector in ((0, _WORDS), (1, _FLOATS), (3, _HALVES), (4, _FLOATS))
        )
        look_up = builder.module.declare_intrinsic(
            "llvm.x86.avx512.permvar.sf.512", (), ir.FunctionType(_FLOATS, [_FLOATS, _WORDS])
        )
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch = builder.module.declare_intrinsic(
            "llvm.prefetch", (byte,), ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        parts = ROWS // LANES
        sums = [cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES)) for _ in range(parts)]
        with cgutils.for_range(builder, args[2]) as loop:
            at = builder.mul(loop.index, ir.Constant(loop.index.type, parts))
            word = [builder.load(builder.gep(words, [builder.add(at, at.type(k))]), align=4) for k in range(parts)]
            for k in range(parts):
                ahead = builder.gep(words, [builder.add(at, at.type(PREFETCH + k))])
                builder.call(
                    fetch, [builder.bitcast(ahead, ir.IntType(8).as_pointer()), *map(ir.IntType(32), (0, 3, 1))]
                )
            at = builder.mul(loop.index, ir.Constant(loop.index.type, 8))
            for nibble in range(8):
                numbers = builder.load(builder.gep(table, [builder.add(at, at.type(nibble))]), align=4)
                for k in range(parts):
                    index = builder.lshr(word[k], ir.Constant(_WORDS, [4 * nibble] * LANES))
                    found = builder.call(look_up, [numbers, index])  # which reads the index's lowest four bits
                    builder.store(builder.fadd(builder.load(sums[k]), found), sums[k])
        for k in range(parts):
            bits = builder.zext(builder.load(builder.gep(scales, [ir.IntType(32)(k)]), align=2), _WORDS)
            scale = builder.bitcast(builder.shl(bits, ir.Constant(_WORDS, [16] * LANES)), _FLOATS)
            place = builder.gep(total, [ir.IntType(32)(k)])
            more = builder.fmul(scale, builder.load(sums[k]))
            builder.store(builder.fadd(builder.load(place, align=4), more), place, align=4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.intp, types.uintp, types.uintp), generate


@njit(nogil=True, cache=True)
def _products(words, scales, table, words_a_group, experts, starts, first, last, out):
    """Blocks of 64 rows first..last-1, counted through the experts in turn; uint16 out [pairs, out]."""
    blocks, length, groups = words.shape[1], words.shape[2], scales.shape[2]
    most = 0
    for i in range(experts.size):
        most = max(most, starts[i + 1] - starts[i])
    total = np.empty((most, 64), np.float32)
    for at in range(first, last):
        which, block = at // blocks, at % blocks
        begin, end = starts[which], starts[which + 1]
        own, scale = words[experts[which], block].ctypes.data, scales[experts[which], block].ctypes.data
        total[:] = np.float32(0)
        for g in range(groups):
            word = g * words_a_group
            count = min(words_a_group, length - word)
            for pair in range(begin, end):
                sums = table[pair, word * 8].ctypes.data
                _add_group(own + word * 256, sums, count, scale + g * 128, total[pair - begin].ctypes.data)
        for pair in range(begin, end):
            for i in range(min(64, out.shape[1] - block * 64)):
                out[pair, block * 64 + i] = bf16_bits(total[pair - begin, i])
