"""What every kernel has to compute, the slow and obvious way: one definition per operation, in plain torch.

Read each one beside its formula. The compiled forms (counter_rng.py, packing.py, cpu_ops/) must give the same bits;
tests/test_kernels.py holds them to it. Weights and scales are tensors of their stored dtype (bf16, fp16, fp32), deltas
fp32, columns and draws int64. Wherever a rounding or the order of a sum can reach a result, it is written out here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import deltas
from .packing import low_bits


def widen(stored: Tensor) -> Tensor:
    """bf16 | fp16 | fp32 -> fp32 of the same shape: exact."""
    return stored.to(torch.float32)


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 -> bf16 | fp16 | fp32 of the same shape: to nearest, ties to even."""
    return values.to(dtype)


def delta(expert: Tensor, base: Tensor) -> Tensor:
    """Two stored matrices of one dtype and shape -> D = W - B, fp32 (DeRS, arXiv 2503.01359, "decompose")."""
    return widen(expert) - widen(base)


def synthesize(base: Tensor, change: Tensor) -> Tensor:
    """Stored base, fp32 change -> round(B + D) in the base's dtype (DeRS, arXiv 2503.01359, "synthesise")."""
    return narrow(widen(base) + change, base.dtype)


def mean(experts: list[Tensor]) -> Tensor:
    """E stored matrices -> the base: summed in fp32 in expert order, times fp32(1 / E), rounded once."""
    total = widen(experts[0])
    for expert in experts[1:]:
        total = total + widen(expert)
    return narrow(total * torch.tensor(1 / len(experts), dtype=torch.float32), experts[0].dtype)


def philox_block(counter, key):
    """Philox4x32-10: 32-bit words, lowest first -> the four words of one block (Salmon et al., SC 2011).

    Words are Python integers or, for many blocks at once, int64 tensors.
    """
    (c0, c1, c2, c3), (k0, k1), low = counter, key, 2**32 - 1
    for _ in range(10):
        (high0, low0), (high1, low1) = _words(0xD2511F53, c0), _words(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def _words(factor: int, word):
    """High and low 32 bits of factor * word, by halves of the factor: no step passes the 63 bits of an int64."""
    below, above = (factor & 0xFFFF) * word, (factor >> 16) * word
    return above + (below >> 16) >> 16, below + ((above & 0xFFFF) << 16) & 0xFFFFFFFF


def draws(key: int, first: int, count: int) -> Tensor:
    """int64 [count], each below 2^32: element i is word i % 4 of the block with counter i // 4 (64 bits, then zeros)."""
    block = torch.arange(first // 4, (first + count + 3) // 4)
    zero = torch.zeros_like(block)
    words = philox_block((block & 2**32 - 1, block >> 32, zero, zero), (key % 2**32, key >> 32))
    return torch.stack(words, dim=1).reshape(-1)[first % 4 :][:count]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers [rows, n] below 2^bits -> uint8 [rows, ceil(n * bits / 8)]: a row's codes end to end, lowest bit first."""
    rows, n = codes.shape
    string = (codes.to(torch.int64)[:, :, None] >> torch.arange(bits) & 1).reshape(rows, n * bits)
    string = torch.nn.functional.pad(string, (0, -string.shape[1] % 8))
    return (string.reshape(rows, string.shape[1] // 8, 8) << torch.arange(8)).sum(2).to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse: uint8 [rows, ceil(n * bits / 8)] -> int64 [rows, n]."""
    string = (packed.to(torch.int64)[:, :, None] >> torch.arange(8) & 1).flatten(1)
    return (string[:, : n * bits].reshape(-1, n, bits) << torch.arange(bits)).sum(2)


def pack_bitmap(columns: Tensor, m: int) -> Tensor:
    """Columns [rows, n] below m -> uint8 [rows, ceil(m / 8)]: bit c is set if column c is among them."""
    bits = torch.zeros(columns.shape[0], m, dtype=torch.int64)
    return pack_codes(bits.scatter(1, columns, 1), 1)


def pack_elias_fano(columns: Tensor, m: int, low_bits: int) -> tuple[Tensor, Tensor]:
    """Columns [rows, n] in 0..m, ascending -> uint8 low, uint8 high (Elias 1974, Fano 1971).

    low holds the low bits of every column as codes; in high, n + (m >> low_bits) + 1 bits, bit (column_i >> low_bits) + i
    is set for the i-th column.
    """
    rows, n = columns.shape
    high = torch.zeros(rows, n + (m >> low_bits) + 1, dtype=torch.int64)
    high = high.scatter(1, (columns >> low_bits) + torch.arange(n), 1)
    return pack_codes(columns % 2**low_bits, low_bits), pack_codes(high, 1)


def pack_positions(columns: Tensor, m: int, unused: bool) -> dict[str, Tensor]:
    """Columns [rows, n] in 0..m, ascending -> {"bitmap"} or {"low", "high"}, whichever is smaller; no empty part.

    With `unused`, column m may occur, any number of times, and a bitmap can't say so. The number of low bits is the
    smallest of those that make low and high, counted in bits, least.
    """
    n = columns.shape[1]
    sizes = [n * low_bits + n + (m >> low_bits) + 1 for low_bits in range(m.bit_length() + 1)]
    low, high = pack_elias_fano(columns, m, sizes.index(min(sizes)))
    if not unused and (m + 7) // 8 <= low.shape[1] + high.shape[1]:
        return {"bitmap": pack_bitmap(columns, m)}
    return {"low": low, "high": high} if low.shape[1] else {"high": high}


def encode_int(delta: Tensor, draws: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """fp32 [rows, in], draws [rows, in] -> codes uint8 [rows, in], scales bf16 [rows, groups].

    A group is `group` consecutive inputs of a row, the last one what is left. Section 3 of the method: symmetric
    codes from 3 bits up; levels (-1.5, -.5, .5, 1.5) at 2 bits and (-1, 1) at 1 bit with the gain rule of DRIVE
    (arXiv 2105.08339): s = sum(d^2) / sum(level * d), in fp64. Where a level of 0 is missing, a draw below 2^31 makes
    the sign of a 0 positive.
    """
    rows, width = delta.shape
    codes = torch.zeros(rows, width, dtype=torch.uint8)
    scales = torch.zeros(rows, math.ceil(width / group), dtype=torch.bfloat16)
    for row in range(rows):
        for g in range(scales.shape[1]):
            at = slice(g * group, (g + 1) * group)
            if bits >= 3:
                codes[row, at], scales[row, g] = _encode_symmetric(delta[row, at], bits)
            else:
                codes[row, at], scales[row, g] = _encode_signed(delta[row, at], draws[row, at], bits)
    return codes, scales


def _encode_symmetric(d: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """fp32 [g] -> codes [g] and s = bf16(max|d| / top); code = round(d * fp32(1 / s)) within +-top, plus 2^(bits-1)."""
    top = 2 ** (bits - 1) - 1
    scale = (d.abs().max() / top).to(torch.bfloat16)
    q = torch.round(d * _quotient(1, widen(scale))).clamp(-top, top)
    return (q + 2 ** (bits - 1)).to(torch.uint8), scale


def _encode_signed(d: Tensor, draws: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """fp32 [g] -> codes [g] and s of 1 or 2 bits; at 2 bits the outer level is for |d| * fp32(1.5 / max|d|) >= 1."""
    level = torch.where((d > 0) | (d == 0) & (draws < 2**31), 1.0, -1.0)
    if bits == 2:
        level = level * torch.where(d.abs() * _quotient(1.5, d.abs().max()) >= 1, 1.5, 0.5)
    energy, against = (d.double() * d.double()).sum(), (level.double() * d.double()).sum()
    scale = narrow(widen(energy / against), torch.bfloat16) if against > 0 else torch.zeros((), dtype=torch.bfloat16)
    return ((level + 1) / 2 if bits == 1 else level + 1.5).to(torch.uint8), scale


def _quotient(numerator: float, value: Tensor) -> Tensor:
    """fp32(numerator / value), but 0 where that is no finite number: so small a group is all zeros."""
    quotient = torch.tensor(numerator, dtype=torch.float32) / value
    return torch.where(quotient.isfinite(), quotient, 0)


def decode_int(codes: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """codes [rows, in], scales bf16 [rows, groups] -> fp32 [rows, in] = level * s of its group."""
    middle = 1.5 if bits == 2 else 2.0 ** (bits - 1)
    levels = 2.0 * codes - 1 if bits == 1 else codes - middle
    return levels * widen(scales).repeat_interleave(group, dim=1)[:, : codes.shape[1]]


def largest_columns(keys: Tensor, k: int) -> Tensor:
    """Keys [rows, in] -> int64 [rows, k]: columns of each row's k largest, ascending; ties go to the lower column."""
    ranked = torch.sort(keys, dim=1, descending=True, stable=True).indices
    return ranked[:, :k].sort(dim=1).values


def largest_drawn(key: int, row: int, width: int, starts: list[int]) -> Tensor:
    """Rows row, row + 1, ... keep starts[i + 1] - starts[i] of `width` columns, those of the largest draws: int64, one list."""
    lines = [draws(key, (row + i) * width, width)[None] for i in range(len(starts) - 1)]
    counts = [b - a for a, b in zip(starts, starts[1:])]
    return torch.cat([largest_columns(line, k)[0] for line, k in zip(lines, counts)])


def n_of_m_columns(keys: Tensor, n: int, m: int) -> Tensor:
    """Keys [rows, in] -> int64 [rows, kept]: the n largest of every m consecutive; of a shorter tail, at most n."""
    starts = range(0, keys.shape[1], m)
    return torch.cat([start + largest_columns(keys[:, start : start + m], n) for start in starts], dim=1)


def gain(delta: Tensor, kept: Tensor) -> Tensor:
    """fp32 D [rows, in] and its kept entries [rows, k] -> fp32 [rows, 1], what to multiply them by: |D|^2 / <kept, D>.

    Sums in fp64; 1 where nothing but zeros is kept. The gain rule of DRIVE and EDEN (arXiv 2105.08339, 2108.08842).
    """
    energy, held = delta.double().square().sum(1, keepdim=True), kept.double().square().sum(1, keepdim=True)
    return torch.where(held > 0, energy / held, 1).to(torch.float32)


def encode_ternary(delta: Tensor, draws: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """fp32 [rows, in], draws [rows] -> columns, negative uint8 [rows, n], scales bf16 [rows], entries clipped.

    Entry d is kept with p = min(1, |d| / s) as sign(d) s (Wangni et al., arXiv 1710.09854); s is the least bf16 with
    n s >= sum|d|, so that sum p <= n; slots left over hold column `in`. Systematic sampling: kept where u + (p summed
    up to here) passes a whole number, u = draw / 2^32. Entries beyond s are clipped and counted; their loss is made
    good in expectation by the gain rule: s becomes s * sum(d^2) / sum(p s |d|). All in fp64, sums from left to right.
    """
    rows, width = delta.shape
    columns = torch.full((rows, n), width)
    negative, scales = torch.zeros(rows, n, dtype=torch.uint8), torch.zeros(rows, dtype=torch.bfloat16)
    clipped = 0
    for row in range(rows):
        d = delta[row].tolist()  # Python's floats are fp64
        total = 0.0
        for value in d:
            total += abs(value)
        scale = _bf16(total / n)
        while float(scale) * n < total:
            scale = torch.nextafter(scale, torch.tensor(math.inf, dtype=torch.bfloat16))
        s, running, energy, expected, kept = float(scale), int(draws[row]) / 2**32, 0.0, 0.0, 0
        for column, value in enumerate(d):
            p = min(1.0, abs(value) / s) if value else 0.0
            clipped += abs(value) > s
            energy += value * value
            expected += p * s * abs(value)
            if math.floor(running + p) > math.floor(running) and kept < n:
                columns[row, kept], negative[row, kept] = column, value < 0
                kept += 1
            running += p
        # below 1e-9 it is the sums' own rounding, and nothing was clipped
        scales[row] = _bf16(s * energy / expected) if energy > expected * (1 + 1e-9) > 0 else scale
    return columns, negative, scales, clipped


def _bf16(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32).to(torch.bfloat16)


def decode_ternary(columns: Tensor, negative: Tensor, scales: Tensor, width: int) -> Tensor:
    """Columns, negative [rows, n], scales bf16 [rows] -> fp32 [rows, width]; column `width` is none."""
    values = torch.where(negative.bool(), -1.0, 1.0) * widen(scales)[:, None]
    return torch.zeros(columns.shape[0], width + 1).scatter(1, columns, values)[:, :width]


def decode_low_rank(left: Tensor, right: Tensor) -> Tensor:
    """left bf16 [out, r], right bf16 [r, in] -> fp32 [out, in]: their product, summed in fp32 from rank 0 up."""
    out = torch.zeros(left.shape[0], right.shape[1])
    for r in range(left.shape[1]):
        out = out + widen(left[:, r, None]) * widen(right[r])
    return out


def error_sums(original: Tensor, coded: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 W, W', B [rows, in] -> fp64 [rows, 6] and max|W' - W| fp32 [rows].

    Columns: |W|^2, |D|^2, |W' - W|^2, <D', D>, <W', W>, |W'|^2 with D = W - B, D' = W' - B; differences in fp32, the
    rest in fp64.
    """
    error = coded - original
    w, c, e, d, k = (x.double() for x in (original, coded, error, original - base, coded - base))
    products = (w * w, d * d, e * e, k * d, c * w, c * c)
    return torch.stack([product.sum(1) for product in products], dim=1), error.abs().amax(1)


def unpack_elias_fano(low: Tensor | None, high: Tensor, n: int, m: int) -> Tensor:
    """uint8 [rows, bytes] each -> the n columns of every row in 0..m, int64 [rows, n]; the inverse of pack_elias_fano."""
    bits, size = low_bits(n, m), n + (m >> low_bits(n, m)) + 1
    places = unpack_codes(high, 1, size).nonzero()[:, 1].reshape(-1, n)  # of the n set bits
    below = unpack_codes(low, bits, n) if low is not None else 0
    return (places - torch.arange(n) << bits) + below


def kept_columns(kept: deltas.Kept, expert: int) -> Tensor:
    """int64 [out, k], ascending; column `in` is none."""
    (_, rows, width), k, positions = kept.shape, kept.kept, kept.positions
    if isinstance(positions, deltas.Drawn):
        return largest_columns(draws(positions.keys[expert], 0, rows * width).reshape(rows, width), k)
    if isinstance(positions, deltas.Bitmap):
        return unpack_codes(positions.bits[expert].cpu(), 1, width).nonzero()[:, 1].reshape(rows, k)
    low = None if positions.low is None else positions.low[expert].cpu()
    return unpack_elias_fano(low, positions.high[expert].cpu(), k, width)


def decode(delta: deltas.Delta, expert: int) -> Tensor:
    """One expert's D, fp32 [out, in] on the CPU."""
    if isinstance(delta, deltas.Ints):
        codes = unpack_codes(delta.codes[expert].cpu(), delta.bits, delta.width)
        return decode_int(codes, delta.scale[expert].cpu(), delta.bits, delta.group)
    if isinstance(delta, deltas.Kept):
        coded = isinstance(delta.values, deltas.Ints)
        values = decode(delta.values, expert) if coded else widen(delta.values[expert].cpu())
        wide = torch.zeros(values.shape[0], delta.width + 1)
        return wide.scatter(1, kept_columns(delta, expert), values)[:, : delta.width]
    if isinstance(delta, deltas.LowRank):
        return decode_low_rank(delta.left[expert].cpu(), delta.right[expert].cpu())
    if isinstance(delta, deltas.Sum):
        return decode(delta.first, expert) + decode(delta.then, expert)
    raise TypeError(f"no definition of {type(delta).__name__}")


def delta_matmul(x: Tensor, delta: deltas.Delta, expert: int) -> Tensor:
    """x [T, in] -> fp64 [T, out] = x @ D.T, of D as it is decoded; no sum is rounded."""
    return x.cpu().double() @ decode(delta, expert).double().T


def moe_forward(
    x: Tensor,
    index: Tensor,
    gates: Tensor,
    gate: deltas.Projection | None,
    up: deltas.Projection,
    down: deltas.Projection,
    activation: str,
) -> Tensor:
    """x [T, hidden], int64 [T, k], [T, k] -> fp64 [T, hidden] = sum over a token's experts e of g_e FFN_e(x).

    FFN_e(x) = (act(x Wg') * (x Wu')) Wd', or act(x Wu') Wd' without a gate, W = B + D_e (method, section 4). An index
    outside 0..E-1 adds nothing.
    """
    x, index, gates = x.cpu().double(), index.cpu(), gates.cpu().double()
    out, act = torch.zeros(x.shape[0], down.base.shape[0], dtype=torch.float64), ACTIVATIONS[activation]
    experts = next(
        (p.delta.shape[0] for p in (up, down, gate) if p and p.delta), int(index.max()) + 1 if index.numel() else 0
    )
    for expert in index.unique().tolist():
        token, place = (index == expert).nonzero(as_tuple=True)
        if not 0 <= expert < experts:
            continue
        weights = [_weight(p, expert) for p in (gate, up, down)]
        hidden = x[token] @ weights[1].T
        hidden = act(hidden) if gate is None else act(x[token] @ weights[0].T) * hidden
        out.index_add_(0, token, hidden @ weights[2].T * gates[token, place, None])
    return out


def _weight(projection: deltas.Projection | None, expert: int) -> Tensor | None:
    """B + D_expert, fp64, not rounded."""
    if projection is None:
        return None
    base = projection.base.cpu().double()
    return base if projection.delta is None else base + decode(projection.delta, expert).double()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
}


def expert_gram(experts: Tensor) -> Tensor:
    """[E, n] floats -> fp64 [E, E]: inner products of every two experts."""
    wide = experts.cpu().double()
    return wide @ wide.T
