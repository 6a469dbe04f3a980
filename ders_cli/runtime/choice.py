"""Apart or whole: which of the two ways an expert's product is the faster one.

    apart    x @ B.T once for a token, and for each of its experts the short x @ D.T
    whole    the synthesised W, from the cache if it is there, and x @ W.T for each expert

Measured on one core of an AMD EPYC (avx512_bf16), torch 2.13, bf16 [5632, 2048], ms (docs/measure/products.py; whole
layers: docs/measure/decode.py):

    tokens of an expert     1      4     16     64    256
    x @ W.T              1.61   1.39   2.00   4.62   13.2
    int4, W made first   3.52   3.09   3.91   7.20   15.9
    int8 x @ D.T         0.84   1.24   4.61
    int4 x @ D.T         0.51   0.67   2.38   9.5    35.3
    int2 x @ D.T         0.33   0.64   2.22
    int1 x @ D.T         0.24   0.40   1.27   4.97
    rank16 x @ D.T       0.11   0.12   0.18   0.26   0.50
    CSR, 1/10 kept       0.94   0.82   1.76   6.37   27.7
    CSR, 1/50 kept       0.36   0.34   0.63   1.82
"""

from ..codecs import DeltaCodec
from ..codecs.integers import IntCodec
from .forms import Form
from .low_rank import LowRank
from .scattered import density

# tokens of an expert up to which `apart` wins: over a W that is in the cache, over one that must be made first
ONE_BIT_TOKENS = (12, 64)
CODES_TOKENS = (6, 24)  # int2, int3, int4
WIDE_TOKENS = (2, 12)  # int5 ... int8
SCATTERED_TOKENS = (8, 64)
SMALL = 4 << 20  # entries of a matrix; between 1536 x 576 and 5632 x 2048, which were measured
FEW = 0.02  # share kept up to which the CSR product wins at any number of tokens


def small(shape: tuple[int, int]) -> bool:
    """Whether calls cost more than reading W: whole models of [1536, 576] decode 1.5 times as fast with kept weights."""
    return shape[0] * shape[1] < SMALL


def choose(
    codec: DeltaCodec, form: Form | None, shape: tuple[int, int], tokens: float, active: int, kept: bool, gradient: bool
) -> str:
    """ "apart" or "whole" for [out, in] matrices.

    form: the codec's short way, None if it has none or it doesn't run here. tokens: mean number for an expert that has
    any. active: such experts. kept: all synthesised weights fit in the cache. gradient: backward will follow; then
    nothing is kept.
    """
    if form is None:
        return "whole"
    if kept and not gradient and small(shape):
        return "whole"
    if isinstance(form, LowRank):
        return "apart"
    if kept and not gradient and active == 1:  # base and delta are more than one W
        return "whole"
    if isinstance(codec, IntCodec):
        return _codes(codec.bits, tokens, active, kept)
    if density(codec, shape) <= FEW:
        return "apart"
    return "apart" if not gradient and tokens <= SCATTERED_TOKENS[not kept] else "whole"


def _codes(bits: int, tokens: float, active: int, kept: bool) -> str:
    if bits > 4 and kept and active == 2:  # half of W's bytes each, and the base
        return "whole"
    limits = ONE_BIT_TOKENS if bits == 1 else CODES_TOKENS if bits <= 4 else WIDE_TOKENS
    return "apart" if tokens <= limits[not kept] else "whole"
