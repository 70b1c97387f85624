"""Triton kernels and their torch-only meaning; importing this package imports no triton.

What can be called lies on top: a file for each kernel (`pool.py`), or a folder (`conv2d/`). Each
has a function, and one in `_launch` that builds the call as data (`launch.py`); `reference.py` is
what they mean. `tiles/` cuts their work and chooses how, `jit/` is what they share on the GPU,
`aot/` compiles them for a GPU that is not here, `compiled/` runs what was compiled.
"""
