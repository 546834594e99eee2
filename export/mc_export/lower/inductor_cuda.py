"""Engine files for AOTInductor on an NVIDIA GPU: as for the CPU, with the step by the kernels of `mc_kernels`.

Compiled on the GPU it is for. Not run on one yet; what needs none is tested.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.export.passes import move_to_device_pass

import mc_kernels
from mc_export.lower.inductor import CONSTANTS_BESIDE, compiled, constants_of, exported_in, find_compiler, metadata_of, sizes_of
from mc_export.lower.memory import run_memory_of
from mc_export.program.base import Program
from mc_export.quantize.fp8.layers import Fp8Linear
from mc_export.rewrites.counts import check_operators
from mc_export.rewrites.kernels import use_kernels
from mc_kernels.fp8_linear import CAPABILITY
from mc_kernels.launch import traced
from mc_runtime.backends.packages import base_version
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import EngineError

_INSTEAD = "or build with --target inductor or onnxruntime, which run on a CPU"
_TRITON = "pip install 'mc-runtime[kernels]'"


def engine_files(program: Program, precision: Precision, directory: Path) -> tuple[list[Path], dict[str, Any]]:
    """Compiles `program` for this machine's GPU into `directory`; arguments and results as for the CPU.

    The engine's options also say the GPU's compute capability, and how much of its memory weights and a run take.

    Raises:
        EngineError: no GPU, no Triton or no C++ compiler is here, or a block of the backbone was not matched.
    """
    capability = required_gpu(precision)
    compiler = find_compiler()
    kernels = use_kernels(program)
    exported = exported_in(program, precision)
    in_fp8 = sum(isinstance(layer, Fp8Linear) for layer in program.modules())
    check_operators(exported, program.component, kernels, in_fp8)
    exported = move_to_device_pass(exported, "cuda")
    settings = {**CONSTANTS_BESIDE, "cpp.cxx": compiler, "aot_inductor.metadata": metadata_of(program)}
    with traced():
        package = compiled(exported, program.component, settings, directory)
    weights = directory / f"{program.component}.safetensors"
    save_file(constants_of(exported, package), str(weights))
    options = {
        "torch": base_version(torch.__version__),
        "capability": list(capability),
        "gpu_bytes": weights.stat().st_size,
        "run_memory": run_memory_of(program),
        "sizes": sizes_of(program),
    }
    return [package, weights], options


def cache_facts(precision: Precision) -> dict[str, Any]:
    """The GPU's compute capability and the kernels' sources.

    Raises:
        EngineError: as `required_gpu`.
    """
    sources = sorted(Path(mc_kernels.__path__[0]).glob("*.py"))
    digests = {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sources}
    return {"capability": required_gpu(precision), "kernels": digests}


def required_gpu(precision: Precision = Precision.FP32) -> tuple[int, int]:
    """The compute capability of the GPU that torch uses.

    Raises:
        EngineError: torch sees none or none that has the precision, or Triton is not installed; the message says what to
            install or to build instead.
    """
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none here"
        raise EngineError(f"inductor-cuda compiles on the GPU it is for, and {why}; build it on a machine with one, {_INSTEAD}")
    if find_spec("triton") is None:
        raise EngineError(f"inductor-cuda compiles Triton kernels and triton is not installed; {_TRITON}, {_INSTEAD}")
    capability: tuple[int, int] = torch.cuda.get_device_capability()
    if precision is Precision.FP8 and capability < CAPABILITY:
        here, first = (".".join(map(str, each)) for each in (capability, CAPABILITY))
        raise EngineError(
            f"fp8 needs compute capability {first}, the GPU here has {here}; build with --precision bf16, or with --target "
            "tensorrt --precision int8"
        )
    return capability
