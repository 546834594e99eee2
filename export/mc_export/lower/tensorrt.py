"""Plans for TensorRT and TensorRT for RTX, from an ONNX graph in the precision that they compute in.

Networks are strongly typed: what an operator computes in is what the graph says. TensorRT for RTX builds without a GPU, for the
compute capabilities that are named; TensorRT builds for the GPU at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mc_export.lower.onnx import OnnxFile
from mc_export.lower.trt_monitor import make_monitor
from mc_export.lower.trt_stream import build_into
from mc_kernels import int4_weights
from mc_kernels.fp8_linear import CAPABILITY
from mc_runtime.backends.cuda import load_cuda, this_gpu
from mc_runtime.backends.trt_libraries import TRT_LIBRARIES, TrtLibrary, collecting_nothing, make_log, network_flags
from mc_runtime.backends.trt_plans import Profile, profile_shapes
from mc_runtime.bundle.manifest import Precision, Tensor
from mc_runtime.errors import EngineError, RequestError

# What a plan is built for if nothing is named: every generation of TensorRT for RTX from Ampere on. Turing has no bf16.
DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
# The first with a precision, and what to take before it. The library's own refusal comes after minutes of building.
_FIRST = {
    Precision.BF16: ((8, 0), "fp16"),
    Precision.FP8: (CAPABILITY, "int8 or bf16"),
    Precision.INT4: (int4_weights.CAPABILITY, "fp16"),
}
_SHOWN_ERRORS = 5


def builds_plans(target: str) -> bool:
    """Whether a target is one of the two."""
    return target in TRT_LIBRARIES


@dataclass(frozen=True)
class PlanOrder:
    """One plan to build.

    Attributes:
        target, precision, inputs, outputs: as the manifest will have them.
        profiles: the sizes it takes.
        capabilities: compute capabilities to build for; none for the target's own choice.
        tick: told of the share that is done, from 0 to 1; what it raises stops the build.
    """

    component: str
    target: str
    precision: Precision
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    profiles: Sequence[Profile]
    capabilities: tuple[str, ...] = ()
    tick: Callable[[float], None] = field(default=lambda share: None)


@collecting_nothing
def plan_file(onnx: OnnxFile, order: PlanOrder, directory: Path) -> tuple[list[Path], dict[str, Any]]:
    """Builds a plan into `directory`.

    Returns:
        The file, and the engine's options for the manifest (`mc_runtime.backends.trt_plans.TrtPlan`).

    Raises:
        EngineError: the library is not installed, cannot read the graph, or cannot build it.
    """
    library = TRT_LIBRARIES[order.target]
    trt = library.load()
    capabilities = capabilities_for(order.target, order.capabilities, order.precision)
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(network_flags(trt))
    _parse(trt, network, log, onnx.path, order)
    config = builder.create_builder_config()
    if order.precision is Precision.FP32:
        config.clear_flag(trt.BuilderFlag.TF32)  # which keeps 10 bits of 23
    if library.builds_anywhere:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(_capabilities(trt)[capability], index)
    for profile in order.profiles:
        _add_profile(builder, config, order, profile)
    monitor = make_monitor(trt, order.tick)
    config.progress_monitor = monitor
    file = directory / f"{order.component}.engine"
    size = build_into(trt, builder, network, config, file)
    monitor.raise_what_stopped_it()
    order.tick(1.0)  # the library does not announce its last steps
    if not size:
        raise EngineError(
            f"{order.component}: {library.target} {trt.__version__} does not build it: {log.take()[:500]}; {_instead(order)}"
        )
    options = {
        "version": str(trt.__version__),
        "capabilities": list(capabilities),
        "profiles": [{name: list(sizes) for name, sizes in profile.items()} for profile in order.profiles],
        "gpu_bytes": size,
    }
    return [file], options


def _parse(trt: Any, network: Any, log: Any, graph: Path, order: PlanOrder) -> None:
    """Reads a graph into a network. Raises EngineError with what the parser says of it."""
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = "; ".join(dict.fromkeys(_said(error) for error in errors[:_SHOWN_ERRORS])) or log.take()
        more = f" (and {len(errors) - _SHOWN_ERRORS} more)" if len(errors) > _SHOWN_ERRORS else ""
        raise EngineError(
            f"{order.component}: {order.target} {trt.__version__} cannot read its graph: {said}{more}; {_instead(order)}"
        )
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for tensors, specs in ((inputs, order.inputs), (outputs, order.outputs)):
        found, listed = sorted(tensor.name for tensor in tensors), sorted(spec.name for spec in specs)
        if found != listed:
            raise EngineError(f"{order.component}: the network has {found} where {listed} were asked for; {_instead(order)}")
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise EngineError(f"{order.component}: sizes depend on the numbers in {tensor.name}; {_instead(order)}")


def _said(error: Any) -> str:
    """A parser's error in one line: the operator, the node and the reason."""
    operator, node = error.node_operator(), error.node_name()
    where = f"{operator} at {node}: " if operator or node else ""
    return (where + " ".join(str(error.desc()).split()))[:300]


def _add_profile(builder: Any, config: Any, order: PlanOrder, profile: Profile) -> None:
    native = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in profile_shapes(order.inputs, profile).items():
        native.set_shape(name, smallest, usual, largest)
    if config.add_optimization_profile(native) < 0:
        raise EngineError(f"{order.component}: {order.target} does not take the sizes {dict(profile)}; {_instead(order)}")


def _instead(order: PlanOrder) -> str:
    return f"build this engine for another target with --engine {order.component}=onnxruntime:fp32"


def _capabilities(trt: Any) -> dict[str, Any]:
    """The compute capabilities that the library can name, such as `8.9`."""
    named = trt.ComputeCapability.__members__.items()
    return {f"{name[2:-1]}.{name[-1]}": member for name, member in named if name.startswith("SM")}


def capabilities_for(target: str, asked: Sequence[str] = (), precision: Precision = Precision.FP32) -> tuple[str, ...]:
    """The compute capabilities that a plan is built for.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        asked: what was named; none for the target's own choice.
        precision: of the plan.

    Raises:
        RequestError: one that the library does not know, or that has no such precision; the message lists those it knows.
        EngineError: the library is not installed, or the target builds for the GPU at hand and there is none, or one that has
            no such precision.
    """
    library = TRT_LIBRARIES[target]
    if not library.builds_anywhere:
        here = _of_this_gpu(library, asked)
        if _is_before(here[0], precision):
            raise EngineError(f"{target}: {_refusal(here, precision)}")
        return here
    known = _capabilities(library.load())
    wrong = [capability for capability in asked if capability not in known]
    if wrong:
        raise RequestError(f"--compute-capability {', '.join(wrong)}: {target} builds for {', '.join(known)}")
    before = [capability for capability in asked if _is_before(capability, precision)]
    if before:
        raise RequestError(f"--compute-capability {', '.join(before)}: {_refusal(before, precision)}")
    usual = (name for name in DEFAULT_CAPABILITIES if name in known and not _is_before(name, precision))
    return tuple(dict.fromkeys(asked)) or tuple(usual)


def _is_before(capability: str, precision: Precision) -> bool:
    """Whether GPUs of a compute capability lack a precision."""
    return precision in _FIRST and tuple(map(int, capability.split("."))) < _FIRST[precision][0]


def _refusal(capabilities: Sequence[str], precision: Precision) -> str:
    (major, minor), instead = _FIRST[precision]
    return (
        f"{precision} needs compute capability {major}.{minor}, {', '.join(capabilities)} has none; build with --precision "
        f"{instead}"
    )


def _of_this_gpu(library: TrtLibrary, asked: Sequence[str]) -> tuple[str, ...]:
    library.load()
    gpu = this_gpu(load_cuda())
    if gpu is None:
        raise EngineError(
            f"{library.target} builds on the GPU it is for, and there is none here; build on a machine with one, or with "
            "--target tensorrt-rtx, which builds anywhere"
        )
    here = ".".join(map(str, gpu.capability))
    if any(capability != here for capability in asked):
        raise RequestError(
            f"--compute-capability {', '.join(asked)}: {library.target} builds for the GPU at hand, {gpu.name} with {here}; "
            "leave it out, or build with --target tensorrt-rtx"
        )
    return (here,)


def plan_facts(target: str, asked: Sequence[str], precision: Precision = Precision.FP32) -> dict[str, Any]:
    """What a plan depends on besides its graph: the library's version and the GPUs it is for. Raises as `capabilities_for`."""
    return {
        "version": str(TRT_LIBRARIES[target].load().__version__),
        "capabilities": capabilities_for(target, asked, precision),
    }
