"""Graph → Plan → kernel launches on an NVIDIA GPU (or in Triton's interpreter, for tests)."""
