"""Deltas fitted to what a layer's experts see: `gptq` for integers, `whitened` for low rank (docs/calibration.md).

H = X'X / t, the inputs' second moment, says what an error of the weights costs in outputs: |E X'|^2 / t = tr(E H E').
"""

import numpy as np

DAMPING = 1.0  # of H's mean diagonal: see docs/calibration.md; GPTQ's own default is 0.01


def moment(inputs: np.ndarray) -> np.ndarray:
    """fp32 inputs [t, in] -> H + damping, fp64 [in, in]. The identity where all inputs are 0."""
    hessian = (inputs.T @ inputs).astype(np.float64) / max(1, len(inputs))
    mean = float(np.mean(np.diag(hessian)))
    hessian[np.diag_indices(len(hessian))] += DAMPING * mean if mean > 0 else 1.0
    return hessian
