"""What mc-runtime does on an NVIDIA GPU, in under ten minutes: `python -m benchmarks.gpu` (docs/benchmarks.md has the how).

Every section is a process of its own: one that hangs, runs out of memory or ends in a fault of a kernel costs only itself.
"""
