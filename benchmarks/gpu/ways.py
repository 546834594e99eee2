"""The contestants: in how many ways a request is run. A new one (step caching) is one more row of `WAYS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.gpu.sections import COMPILE, EAGER
from mc_export.program.step import StepProgram
from mc_export.quantize.fp8.layers import Activations
from mc_export.quantize.fp8.sites import find_sites, put_fp8
from mc_export.quantize.sensitivity import Layer, free_layers
from mc_export.rewrites.kernels import use_kernels

Change = Callable[[StepProgram], object]
# Cells along height and width at which a step's layers are weighed: enough for what is done once a sample to weigh nothing.
_WEIGHED_AT = 24


def _kernels(step: StepProgram) -> object:
    return use_kernels(step)


def _in_fp8(step: StepProgram) -> object:
    """The blocks' products in FP8, but for those that do next to no work: random weights have nothing to measure."""
    extents = step.example_extents
    extents |= {name: min(step.axes[name].max, _WEIGHED_AT * step.axes[name].multiple) for name in ("H", "W")}
    place = next(step.parameters()).device
    feed = {name: tensor.to(place) for name, tensor in step.example(extents).items()}
    with torch.autocast(place.type, torch.bfloat16):
        sites = find_sites(step, [feed])
    free = free_layers([Layer(site.name, site.work) for site in sites])
    blocks = [site for site in sites if any(part.isdigit() for part in site.name.split("."))]
    return put_fp8(step, [site for site in blocks if site.name not in free], Activations.ROWS)


@dataclass(frozen=True)
class Way:
    """One contestant.

    Attributes:
        name: in the report.
        ours: our programs in the runtime's loop; otherwise the reference pipeline.
        changes: what is done to our step program before it is lowered to bfloat16, in order.
        compiled: blocks by `torch.compile`, one compilation for all that are alike.
        graph: each step replayed as a CUDA graph.
        package: the step is a package of the target `inductor-cuda`, compiled in a process of its own.
        variant: of the bars it answers: "bf16", "fp8" or "cached".
    """

    name: str
    ours: bool = False
    changes: tuple[Change, ...] = ()
    compiled: bool = False
    graph: bool = False
    package: bool = False
    variant: str = "bf16"


# In the order in which they are prepared: what matters most first, in case time runs out.
WAYS = (
    Way(EAGER),
    Way("kernels, blocks compiled, graph", ours=True, changes=(_kernels,), compiled=True, graph=True),
    Way(COMPILE, compiled=True),
    Way("fp8, blocks compiled, graph", ours=True, changes=(_in_fp8, _kernels), compiled=True, graph=True, variant="fp8"),
    Way("package, graph", ours=True, package=True, graph=True),
    Way("kernels, graph", ours=True, changes=(_kernels,), graph=True),
)


def compile_blocks(*modules: nn.Module | None, backend: str | None) -> int:
    """Compiles, in place, every block of a row of blocks of one kind, and the connector's step; returns how many.

    Without a backend it only counts them.

    A whole model of fifty blocks takes minutes to compile. One compilation serves all blocks of equal shapes as long as no
    block's number is taken for a constant, hence the two settings. diffusers' `compile_repeated_blocks` does the same.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    torch._dynamo.config.recompile_limit = 64
    count = 0
    for module in filter(None, modules):
        inside: set[int] = set()
        for child in module.modules():
            if id(child) in inside:
                continue
            if hasattr(child, "residual"):  # a connector: its step is this method, not its forward
                if backend is not None:
                    child.residual = torch.compile(child.residual, backend=backend)  # type: ignore[assignment]
                inside |= {id(part) for part in child.modules()}
                count += 1
            elif isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(block) for block in child}) == 1:
                for block in child:
                    if backend is not None:
                        block.compile(backend=backend, dynamic=None if _equal_shapes(child) else False)
                    inside |= {id(part) for part in block.modules()}
                    count += 1
    return count


def _equal_shapes(blocks: nn.ModuleList) -> bool:
    """Whether all have parameters of the same shapes; a decoder's stages do not, and each is best compiled for its own."""
    return len({tuple(parameter.shape for parameter in block.parameters()) for block in blocks}) == 1
