"""Triton kernels of mc-runtime, one file a kernel, each beside its plain PyTorch reference.

Each kernel's file holds the formula, the reference, the Triton kernel and its launcher, and registers one operator under
``torch.ops.mc_kernels`` that runs the kernel on CUDA tensors and the reference on all others. The operators work eager,
compiled and exported. Importing this package imports neither torch nor triton; importing one of its modules imports torch.
"""
