"""Compiled CPU kernels (numba, no compiler needed): row blocks that stay in cache, the interpreter lock released."""
