"""Compiles the kernels for GPUs that are not there, and reads registers, spills and load widths off the machine code."""
