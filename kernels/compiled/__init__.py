"""Compiled kernels without a compiler: as data, in files, and launched through the CUDA driver.

Only `build.py`, which makes them, imports torch and triton.
"""
