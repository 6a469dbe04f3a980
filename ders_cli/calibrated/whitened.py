"""Low rank where the inputs are: the truncated singular value decomposition of D S, with H = S S' (SVD-LLM, arXiv 2403.07378).

    D S = U s V'      left = U_r sqrt(s_r)      right = sqrt(s_r) V_r' S^-1

makes |(D - left right) X'|, in the mean over the (damped) inputs, the least that rank r allows: the tail of s. The plain codec
has S = I. Damping is what keeps directions that the text never shows (docs/calibration.md).
"""

import numpy as np
from ders_kernels.cpu_ops import floats, lowrank

from ..codecs.base import Parts
from ..codecs.rank import RankCodec


def encode(codec: RankCodec, delta: np.ndarray, hessian: np.ndarray, key: int) -> Parts:
    """A whole delta fp32 [out, in], H fp64 [in, in] -> left [out, r], right [r, in] of the codec's dtype.

    Raises numpy.linalg.LinAlgError where H is not positive definite or products overflow.
    """
    root = np.linalg.cholesky(hessian)
    root /= np.sqrt(np.mean(np.diag(hessian)))  # S = I for white inputs: factors of the plain codec's size
    left, right = lowrank.factors(
        (delta.astype(np.float64) @ root).astype(np.float32), min(codec.rank, *delta.shape), key
    )
    right = np.linalg.solve(root.T, right.T.astype(np.float64)).T.astype(np.float32)
    return {"left": floats.narrow(left, codec.dtype), "right": floats.narrow(right, codec.dtype)}
