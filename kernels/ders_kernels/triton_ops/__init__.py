"""The operations of dispatch.py as Triton kernels, for NVIDIA and AMD GPUs.

All products are computed as Y.T = W X.T: the weights' tile, made in registers from what is stored, is the left operand
of the matrix instruction, so its rows fill that instruction even where there is one token. Sums are fp32. Every load has
a mask on every axis: any size of any dimension is right. Sums over K are in one program, in one order: no atomics, the
same bits from the same call. Configurations are chosen by shape, not by timing, for the same reason.
"""
