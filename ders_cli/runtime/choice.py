"""Apart or whole: which of the two ways an expert's product is the faster one.

    apart    x @ B.T once for a token, and for each of its experts the short x @ D.T
    whole    the synthesised W, from the cache if it is there, and x @ W.T for each expert

Measured on a 2-core AMD EPYC (avx512_bf16), torch 2.13, bf16 [5632, 2048], ms (docs/measure/decode.py has whole layers):

    tokens of an expert     1      4      8     16     64    256
    x @ W.T              1.13   1.06   1.17   1.30   2.53   7.32
    int4 x @ D.T         0.31   0.46   0.86   1.49   5.94   24.0
    rank16 x @ D.T       0.29   0.17   0.19   0.20   0.37   0.64
    CSR, 1/10 kept       0.67   0.65          1.24   4.85
    CSR, 1/100 kept      0.14   0.18          0.43   0.97
"""

from ..codecs import DeltaCodec
from .forms import Form
from .low_rank import LowRank
from .packed import Packed
from .scattered import density

# tokens of an expert up to which `apart` wins: over a W that is in the cache, over one that must be made first
PACKED_TOKENS = (6, 96)
SCATTERED_TOKENS = (8, 64)
SMALL = 4 << 20  # entries of a matrix; between 1536 x 576 and 5632 x 2048, which were measured
FEW = 0.02  # share kept up to which the CSR product wins at any number of tokens


def small(shape: tuple[int, int]) -> bool:
    """Whether calls cost more than reading W: whole models of [1536, 576] decode 1.5 times as fast with kept weights."""
    return shape[0] * shape[1] < SMALL


def choose(
    codec: DeltaCodec, form: Form | None, shape: tuple[int, int], tokens: float, kept: bool, gradient: bool
) -> str:
    """ "apart" or "whole" for [out, in] matrices.

    form: the codec's short way, None if it has none or it doesn't run here. tokens: mean number for an expert that has
    any. kept: all synthesised weights fit in the cache. gradient: backward will follow; then nothing is kept.
    """
    if form is None:
        return "whole"
    if kept and not gradient and small(shape):
        return "whole"
    if isinstance(form, LowRank):
        return "apart"
    if isinstance(form, Packed):
        return "apart" if tokens <= PACKED_TOKENS[not kept] else "whole"
    if density(codec, shape) <= FEW:
        return "apart"
    return "apart" if not gradient and tokens <= SCATTERED_TOKENS[not kept] else "whole"
