"""Graph → Plan: which kernels, with which tiles, on which memory."""
