"""Kernels compiled where there is no GPU, for one that is: `python -m bench.gpu.cache`."""
