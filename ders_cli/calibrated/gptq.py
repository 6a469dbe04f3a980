"""GPTQ (Frantar et al., arXiv 2210.17323) on a delta: integer codes chosen for the outputs' error, not the weights'.

Columns are coded one after the other; what a column got wrong is made good, as far as the inputs go together, by those
that follow. GPTQ writes this with the inverse of H, from which it eliminates column after column. The same codes come from
H = R R', R upper triangular, without any inverse (LDLQ; QuIP, arXiv 2307.13304, theorem 6):

    target_j = d_j + sum over i < j of (d_i - coded_i) R_ij / R_jj

Scales are those of the plain codec, from the delta as it is: measured better than scales of the updated weights, and with
them the delta keeps its size in the outputs, so there is no gain to correct (docs/calibration.md). Only codes differ.
"""

import numpy as np
from ders_kernels.cpu_ops import feedback as kernels
from ders_kernels.cpu_ops import floats

from ..codecs.base import Parts
from ..codecs.integers import IntCodec

BLOCK = 128  # columns: errors of earlier blocks are passed on by one product


def feedback(hessian: np.ndarray) -> np.ndarray:
    """H fp64 [in, in], positive definite -> R_ij / R_jj, fp32 [in, in], upper triangular with ones on the diagonal.

    Raises numpy.linalg.LinAlgError where H is not positive definite.
    """
    # from the last row and column to the first, Cholesky's lower factor is the upper one that is wanted
    factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    return np.ascontiguousarray(factor / np.diag(factor), np.float32)


def encode(codec: IntCodec, delta: np.ndarray, hessian: np.ndarray, key: int) -> Parts:
    """A whole delta fp32 [out, in] -> the codec's parts; plain ones where numbers pass fp32's range on the way."""
    plain = codec.encode(delta, key, 0)
    ratios, errors = feedback(hessian), np.zeros_like(delta)
    codes, inverses = np.empty(delta.shape, np.uint8), np.empty(plain["scale"].shape, np.float32)
    kernels.unpack(plain["codes"], codec.bits, codes)
    kernels.thresholds(delta, plain["scale"], codec.bits, codec.group_size, inverses)
    for begin in range(0, delta.shape[1], BLOCK):
        block = slice(begin, begin + BLOCK)
        targets = delta[:, block] + errors[:, :begin] @ ratios[:begin, block]
        kernels.choose(
            delta, plain["scale"], inverses, codec.bits, codec.group_size, ratios, begin, targets, errors, codes
        )
    if floats.first_nonfinite(errors) >= 0:
        return plain
    packed = np.empty_like(plain["codes"])
    kernels.pack(codes, codec.bits, packed)
    return {"codes": packed, "scale": plain["scale"]}


def reference(codec: IntCodec, delta: np.ndarray, hessian: np.ndarray, key: int) -> np.ndarray:
    """The coded delta, fp64 [out, in], as the paper has it: column by column, with the inverse of what is left of H.

    Slow, and for few numbers: `encode` is tested against it.
    """
    plain = codec.encode(delta, key, 0)
    before = codec.decode(plain, delta.shape, key, 0)
    steps = floats.widen(plain["scale"], "BF16").astype(np.float64).repeat(codec.group_size, axis=1)
    groups = np.arange(delta.shape[1]) // codec.group_size
    weights, coded = delta.astype(np.float64), np.empty(delta.shape)
    for j in range(delta.shape[1]):
        most = np.abs(delta[:, groups == groups[j]]).max(axis=1)
        coded[:, j] = _nearest(codec.bits, weights[:, j], steps[:, j], most, before[:, j])
        inverse = np.linalg.inv(hessian[j:, j:])
        weights[:, j:] -= np.outer((weights[:, j] - coded[:, j]) / inverse[0, 0], inverse[0])
    return coded


def _nearest(bits: int, wanted: np.ndarray, step: np.ndarray, most: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The level that stands for each number of a column; `most`: the largest |d| of its group in the delta."""
    signs = np.where(wanted > 0, 1, -1)
    if bits >= 3:
        top = 2 ** (bits - 1) - 1
        return np.clip(np.rint(np.divide(wanted, step, out=np.zeros_like(wanted), where=step > 0)), -top, top) * step
    levels = 1.0 if bits == 1 else np.where((np.abs(wanted) >= most / 1.5) & (most > 0), 1.5, 0.5)
    return np.where(wanted == 0, before, signs * levels * step)
