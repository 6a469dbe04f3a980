"""Between stored bit patterns and fp32: widen, narrow, and the two sums of the method.

    delta      D = fp32(expert) - fp32(base)         one fp32 rounding at most
    synthesis  W = round(fp32(base) + D)             to nearest even in the stored dtype

BF16 and F16 arrive as uint16, F32 as uint32. A NaN is narrowed to a quiet NaN of its sign.
"""

import numpy as np

from ..jit import njit

_ROUND = np.uint32(0x7FFF)
_QUIET = np.uint16(0x40)


@njit(nogil=True, cache=True, inline="always")
def bf16_bits(value):
    """fp32 -> uint16 pattern of the nearest bf16, ties to even."""
    u = np.float32(value).view(np.uint32)
    if (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(u >> np.uint32(16)) | _QUIET
    return np.uint16((u + _ROUND + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True, inline="always")
def bf16_value(bits):
    """uint16 pattern of a bf16 -> fp32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit(nogil=True, cache=True)
def _widen_bf16(bits, out):
    for i in range(bits.size):
        out[i] = bf16_value(bits[i])


@njit(nogil=True, cache=True)
def _narrow_bf16(values, out):
    for i in range(values.size):
        out[i] = bf16_bits(values[i])


@njit(nogil=True, cache=True)
def _delta_bf16(expert, base, out):
    for i in range(expert.size):
        out[i] = bf16_value(expert[i]) - bf16_value(base[i])


@njit(nogil=True, cache=True)
def _synthesize_bf16(base, delta, out):
    for i in range(base.size):
        out[i] = bf16_bits(bf16_value(base[i]) + delta[i])


@njit(nogil=True, cache=True)
def _first_nonfinite(values):
    most = np.uint32(0)
    for i in range(values.size):
        most = max(most, values[i] & np.uint32(0x7FFFFFFF))
    if most < np.uint32(0x7F800000):
        return -1
    for i in range(values.size):
        if (values[i] & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F800000):
            return i
    return -1


def widen(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bits -> fp32 of the same shape, exactly."""
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    out = np.empty(bits.shape, np.float32)
    _widen_bf16(bits.reshape(-1), out.reshape(-1))
    return out


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 -> stored bits, to nearest even."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    out = np.empty(values.shape, np.uint16)
    _narrow_bf16(values.reshape(-1), out.reshape(-1))
    return out


def delta(expert: np.ndarray, base: np.ndarray, dtype: str, out: np.ndarray | None = None) -> np.ndarray:
    """fp32(expert) - fp32(base), in fp32; written into `out`, fp32 and contiguous, where that is given."""
    out = np.empty(expert.shape, np.float32) if out is None else out
    if dtype != "BF16":
        with np.errstate(invalid="ignore", over="ignore"):
            return np.subtract(widen(expert, dtype), widen(base, dtype), out=out)
    _delta_bf16(expert.reshape(-1), base.reshape(-1), out.reshape(-1))
    return out


def synthesize(base: np.ndarray, change: np.ndarray, dtype: str) -> np.ndarray:
    """round(fp32(base) + change) as stored bits."""
    if dtype != "BF16":
        with np.errstate(invalid="ignore", over="ignore"):
            return narrow(widen(base, dtype) + change, dtype)
    out = np.empty(base.shape, np.uint16)
    _synthesize_bf16(base.reshape(-1), np.ascontiguousarray(change).reshape(-1), out.reshape(-1))
    return out


def first_nonfinite(values: np.ndarray) -> int:
    """Flat index of the first NaN or infinity of an fp32 array, or -1."""
    return int(_first_nonfinite(np.ascontiguousarray(values).reshape(-1).view(np.uint32)))
