"""Kernels of ders: plain-torch definitions (reference.py) and the compiled CPU forms that agree with them.

Knows numpy, numba and torch; knows nothing of checkpoints.
"""

from . import numba_cache

numba_cache.choose()  # before a module of this package imports numba, which reads its settings then
