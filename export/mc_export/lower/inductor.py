"""Engine files for AOTInductor: a program compiled ahead of time by torch's own compiler, and its weights beside it.

The package (`.pt2`) holds the compiled library and no weights; those lie beside it as safetensors, are mapped into memory and
handed to the library when it is loaded. So a library stays small whatever the model weighs, no compiler and no linker meets a
section of gigabytes, loading copies nothing, and nothing is unpickled.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from mc_export.lower.bf16 import compute_in_bf16
from mc_export.lower.volumes import contiguous_volumes
from mc_export.program.base import Program
from mc_export.program.export import export_program, quick_tracing
from mc_export.quiet import quiet
from mc_runtime.backends.packages import METADATA_KEY, base_version, described_signature
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import EngineError
from mc_runtime.machine import this_machine

_INSTEAD = "or build with --target onnxruntime"
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# What the code is compiled for, by what the CPU has: a named baseline, so that no instruction is used that is not among the
# features the bundle asks for; `native` would take whatever the building machine has.
_BASELINES = (("avx512bw", "skylake-avx512"), ("avx2", "haswell"))


def engine_files(program: Program, precision: Precision, directory: Path) -> tuple[list[Path], dict[str, Any]]:
    """Compiles `program` for this CPU into `directory`.

    Args:
        program: in float32; with bf16, its weights are bf16 afterwards and it is no reference any more.
        precision: fp32 or bf16.
        directory: where the files go; compilation leaves nothing anywhere else.

    Returns:
        The package and its weights, and the engine's options for the manifest.

    Raises:
        EngineError: there is no C++ compiler, or the program cannot be exported or compiled.
    """
    compiler = find_compiler()
    exported = exported_in(program, precision)
    settings = {**_SETTINGS, "cpp.cxx": compiler, "cpp.march": _baseline(), "aot_inductor.metadata": metadata_of(program)}
    package = compiled(exported, program.component, settings, directory)
    weights = directory / f"{program.component}.safetensors"
    save_file(constants_of(exported, package), str(weights))
    here = this_machine()
    options = {
        "torch": base_version(torch.__version__),
        "features": list(here.features),
        "sizes": sizes_of(program),
    }
    return [package, weights], options


def cache_facts(precision: Precision) -> dict[str, Any]:
    """Nothing more: the CPU's features are part of every key, and what a compiler's version changes is not the numbers."""
    return {}


# These make a library smaller and change nothing it computes; torch 2.11 has neither.
_SMALLER = ("aot_inductor.enable_line_tables", "aot_inductor.enable_frame_pointer")
# For every device. Debug information would make a library three times as large.
CONSTANTS_BESIDE: dict[str, Any] = {
    "compile_threads": 1,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.precompile_headers": False,  # they take 15 s, save 4 s an engine, and go to a folder of the user's
    # The wrapper only calls: kernels, which are optimised apart from it, and libraries. This saves 4 s of a tiny engine's 10.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}
_SETTINGS: dict[str, Any] = {
    **CONSTANTS_BESIDE,
    "cpp.dynamic_threads": True,  # the machine that runs it decides, not the one that builds it
    "cpp.vec_isa_ok": True,  # torch has read the CPU's features; trial compilations would only confirm them
}


def exported_in(program: Program, precision: Precision) -> ExportedProgram:
    """`program` exported in a precision, its inputs in the manifest's order.

    Raises:
        EngineError: it cannot be exported.
    """
    lowered = precision in (Precision.BF16, Precision.FP8)  # what is not in fp8 is in bf16
    exported = export_program(compute_in_bf16(program) if lowered else program)
    names, listed = exported.graph_signature.user_inputs, tuple(spec.name for spec in program.inputs)
    if tuple(names) != listed:
        raise EngineError(f"{program.component}: the export takes {names} where the manifest lists {listed}")
    _name_constants(exported)
    return exported


def _name_constants(exported: ExportedProgram) -> None:
    """Makes buffers of the tensors that a model's code writes down: the compiler keeps a buffer's name, and invents theirs."""
    specs = exported.graph_signature.input_specs
    for index, spec in enumerate(specs):
        if spec.kind is InputKind.CONSTANT_TENSOR:
            specs[index] = replace(spec, kind=InputKind.BUFFER, persistent=False)


def compiled(exported: ExportedProgram, component: str, settings: dict[str, Any], directory: Path) -> Path:
    """The package of an exported program, `<component>.pt2`.

    Raises:
        EngineError: torch's compiler or the C++ compiler fails.
    """
    package = directory / f"{component}.pt2"
    # torch puts paths into the compiler's command line as they are: where a shell would quote this one, scratch is elsewhere.
    place = directory if shlex.quote(str(directory)) == str(directory) else None
    with tempfile.TemporaryDirectory(dir=place, prefix=".inductor-") as scratch, _own_cache(scratch), quick_tracing():
        settings = _known(settings)
        try:
            # Patched here as well: part of the compiler asks for them before it looks at those it is given.
            with torch._inductor.config.patch(settings), contiguous_volumes():
                torch._inductor.aoti_compile_and_package(exported, package_path=str(package), inductor_configs=settings)
        except Exception as error:  # inductor, its C++ compiler and sympy raise types of their own; each means the same here
            reason = " ".join(str(error).split())[-500:]
            raise EngineError(f"{component}: AOTInductor does not compile it, {_INSTEAD}: {reason}") from error
    return package


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """Without those of `_SMALLER` that this torch does not have; it refuses a setting that it does not know."""
    from torch._inductor import config

    missing = [name for name in _SMALLER if not hasattr(config.aot_inductor, name.rpartition(".")[2])]
    return {name: value for name, value in settings.items() if name not in missing}


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++, else clang++.

    Raises:
        EngineError: there is none that works.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else ("g++", "clang++"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    what = f"CXX={asked} is no C++ compiler that works" if asked else "there is no C++ compiler here"
    raise EngineError(f"inductor compiles C++ and {what}; install g++ (apt install g++) or name one in CXX, {_INSTEAD}")


def _baseline() -> str | None:
    if platform.machine() != "x86_64":
        return None
    return next((name for feature, name in _BASELINES if feature in this_machine().features), "x86-64")


def sizes_of(program: Program) -> dict[str, list[int]]:
    """How far each dynamic dimension of the compiled code reaches: smallest, largest, multiple."""
    return {axis.name: [axis.min, axis.max, axis.multiple] for axis in program.axes.values()}


def metadata_of(program: Program) -> dict[str, str]:
    """What the package says of itself: the signature, which a shared library does not show."""
    return {METADATA_KEY: described_signature(program.inputs, program.outputs)}


def constants_of(exported: ExportedProgram, package: Path) -> dict[str, torch.Tensor]:
    """The weights that the compiled library asks for, by the names it asks with.

    Raises:
        EngineError: it asks for some that the export does not have.
    """
    loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, 1, -1)
    there = {**exported.state_dict, **exported.constants}
    asked = loader.get_constant_fqns()
    if unknown := sorted(set(asked) - set(there)):
        raise EngineError(f"{package.stem}: the compiler made constants of its own ({', '.join(unknown)}), {_INSTEAD}")
    wanted = {name: there[name] for name in asked}
    # Tied weights are two names of one memory, which a safetensors file does not hold.
    seen: set[int] = set()
    found = {}
    for name, tensor in wanted.items():
        tensor = tensor.detach().cpu()
        repeated = tensor.data_ptr() in seen or not tensor.is_contiguous()
        found[name] = tensor.contiguous().clone() if repeated else tensor
        seen.add(tensor.data_ptr())
    return found


@contextmanager
def _own_cache(directory: str) -> Iterator[None]:
    """Lets torch's compiler write into `directory` alone, and keeps its notes to itself."""
    before = os.environ.get(_CACHE_VARIABLE)
    os.environ[_CACHE_VARIABLE] = directory  # read when the compiler is imported, too
    from torch._inductor.utils import clear_caches

    clear_caches()  # they name files of other directories
    try:
        with quiet("torch._inductor"):
            yield
    finally:
        clear_caches()
        if before is None:
            os.environ.pop(_CACHE_VARIABLE, None)
        else:
            os.environ[_CACHE_VARIABLE] = before
