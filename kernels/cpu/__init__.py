"""Kernels for processors, in C++: convolutions of 3x3 with fewer multiplications.

They are compiled when fastres is installed, if there is a compiler; `library.why_not` says why they
are not there. Nothing is compiled later.
"""
