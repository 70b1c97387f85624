"""Triton kernels and their torch-only meaning; importing this package imports no triton."""
