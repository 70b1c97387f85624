"""Kernels by themselves: compiled (`python -m bench.kernels`), predicted, and timed."""
