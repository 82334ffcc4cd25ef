"""Triton kernels for CUDA devices. Importing this package imports Triton.

x --quantize_act--> q, sx --linear_gemm--> y        two rows and more
x --linear_gemv--> y                                one row, quantised in the prologue
x --linear_float--> y                               activations that stay floating point
"""
