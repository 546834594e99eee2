"""The targets by name. Listing them imports no engine library; creating a backend imports its own and no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mc_runtime.backends.base import Backend, Settings
from mc_runtime.backends.trt_libraries import TRT_LIBRARIES
from mc_runtime.errors import BundleError, EngineError

# What an NVIDIA driver shows of itself. Virtual machines and containers may show the devices alone, WSL only its own.
_DRIVER = tuple(map(Path, ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")))


def _no_gpu() -> tuple[str, str] | None:
    """Why engines for a GPU do not run here, and the mend; None where they do. Nothing is imported."""
    if not any(path.exists() for path in _DRIVER):
        return "there is no NVIDIA GPU, or no driver for it", "use a machine with one, or build for another target"
    return None


def _no_gpu_for_torch() -> tuple[str, str] | None:
    """The same for packages that run inside torch."""
    from mc_runtime.machine import installed_versions

    if (obstacle := _no_gpu()) is not None:
        return obstacle
    if installed_versions(("torch",)).get("torch", "").endswith("+cpu"):
        return "torch is built without CUDA", "install torch's CUDA build of the same version"
    return None


@dataclass(frozen=True)
class _Target:
    """Where a backend's class lives, the library it needs, the command that installs it, whether its engines run on a GPU,
    what else may be in the way, and the class for the device `cuda` where its engines run there too."""

    home: str
    class_name: str
    module: str
    distributions: tuple[str, ...]
    install: str
    on_gpu: bool = False
    obstacle: Callable[[], tuple[str, str] | None] = lambda: None
    on_cuda: tuple[str, str] | None = None

    def backend_class(self, device: str | None) -> type[Backend]:
        """The class for a device, imported now; unless it is its second one, the target's own, which refuses others."""
        home, name = self.on_cuda if self.on_cuda and device == "cuda" else (self.home, self.class_name)
        found: type[Backend] = getattr(import_module(home), name)
        return found


def _tensorrt(name: str, class_name: str) -> _Target:
    """One of the two libraries of one backend."""
    library = TRT_LIBRARIES[name]

    def obstacle() -> tuple[str, str] | None:
        from mc_runtime.machine import installed_versions

        if not installed_versions(("cuda-bindings", "cuda-python")):
            return "cuda.bindings is not installed, which GPU buffers need", library.install
        missing = _no_gpu()
        if missing is not None and library.builds_anywhere:
            return missing[0], "it builds here all the same; to run, use a machine with one"
        return missing

    home = "mc_runtime.backends.tensorrt"
    return _Target(home, class_name, library.module, library.distributions, library.install, True, obstacle)


_TARGETS = {
    "onnxruntime": _Target(
        home="mc_runtime.backends.onnxruntime",
        class_name="OnnxRuntimeBackend",
        module="onnxruntime",
        distributions=("onnxruntime", "onnxruntime-gpu"),
        install="pip install 'mc-runtime[cpu]'",
        on_cuda=("mc_runtime.backends.onnxruntime_cuda", "OnnxRuntimeCudaBackend"),
    ),
    "openvino": _Target(
        home="mc_runtime.backends.openvino",
        class_name="OpenVinoBackend",
        module="openvino",
        distributions=("openvino",),
        install="pip install 'mc-runtime[openvino]'",
    ),
    "inductor": _Target(
        home="mc_runtime.backends.inductor",
        class_name="InductorBackend",
        module="torch",
        distributions=("torch",),
        install="pip install 'mc-runtime[inductor]'",
    ),
    "inductor-cuda": _Target(
        home="mc_runtime.backends.inductor_cuda",
        class_name="InductorCudaBackend",
        module="torch",
        distributions=("torch",),
        install="pip install 'mc-runtime[inductor]'",
        on_gpu=True,
        obstacle=_no_gpu_for_torch,
    ),
    "tensorrt": _tensorrt("tensorrt", "TensorRtBackend"),
    "tensorrt-rtx": _tensorrt("tensorrt-rtx", "TensorRtRtxBackend"),
}

TARGETS = tuple(_TARGETS)
"""Every target a bundle's engines may name."""


def create_backend(name: str, settings: Settings) -> Backend:
    """The backend of that name. Raises BundleError for an unknown target, EngineError where its library is missing."""
    target = _TARGETS.get(name)
    if target is None:
        raise BundleError(f"target {name!r} is unknown to this mc-runtime (it knows {', '.join(TARGETS)}); upgrade it")
    try:
        backend_class = target.backend_class(settings.device)
    except ImportError as error:
        if not _installed(target.module):
            raise EngineError(f"{name} is not installed and this bundle needs it; {target.install}") from None
        raise EngineError(f"{name} is installed but does not load ({error}); {target.install}") from error
    return backend_class(settings)


def runs_on_gpu(name: str) -> bool:
    """Whether a target's engines run on a GPU: what the CPU can do is then of no matter."""
    return name in _TARGETS and _TARGETS[name].on_gpu


def available() -> dict[str, dict[str, Any]]:
    """Per target: `ready`, the library's `version`, and where it is not ready the `reason` and the `mend`."""
    return {name: _diagnose(target) for name, target in _TARGETS.items()}


def _diagnose(target: _Target) -> dict[str, Any]:
    from mc_runtime.machine import installed_versions

    if not _installed(target.module):
        return {"ready": False, "version": None, "reason": f"{target.module} is not installed", "mend": target.install}
    obstacle = target.obstacle()
    version = next(iter(installed_versions(target.distributions).values()), None)
    reason, mend = obstacle if obstacle else (None, None)
    return {"ready": obstacle is None, "version": version, "reason": reason, "mend": mend}


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
