"""Triton kernels of mc-runtime, one file a kernel, each beside its plain PyTorch reference.

This release runs on the graphs that the engines' own compilers make and ships no kernel; the first ones come with the
next release. Importing this package imports neither torch nor triton.
"""
