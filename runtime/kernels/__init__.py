"""Kernels written in Python, one folder a language; imported on first use only."""
