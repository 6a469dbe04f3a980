"""Kernels of ders: plain-torch definitions (reference.py) and the compiled CPU forms that agree with them.

Knows numpy, numba and torch; knows nothing of checkpoints.
"""
