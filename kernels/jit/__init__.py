"""Pieces of kernels that several of them share: each runs on the GPU, within a kernel."""
