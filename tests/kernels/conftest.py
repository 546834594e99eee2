"""Kernels run in two ways without a GPU, and Triton decides between them once, when a kernel is decorated.

Under its interpreter (`TRITON_INTERPRET=1`) they run on CPU tensors: `interpreter/`, each file in a process of its own that
`test_interpreter.py` starts. Without, they compile ahead of time for GPUs that are not there: `test_compiled.py`.
Set the variable yourself to run a file of `interpreter/` directly.
"""

from __future__ import annotations

from mc_kernels.launch import interpreting

collect_ignore = ["test_interpreter.py", "test_compiled.py"] if interpreting() else ["interpreter"]
