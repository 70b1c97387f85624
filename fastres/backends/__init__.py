"""What can run a graph: `reference` (the meaning), `cpu` (OpenVINO), `triton` (our kernels) ..."""
