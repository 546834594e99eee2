"""From an engine program to a `torch.export` program, the one source of every target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any

import torch
import torch._dynamo.config
from torch.export import Dim, ExportedProgram, export
from torch.overrides import TorchFunctionMode

from mc_export.program.base import Program
from mc_export.quiet import quiet
from mc_runtime.bundle.dimensions import factor_and_name
from mc_runtime.errors import EngineError

# Their notes on symbolic shapes: what matters of them is checked by running the result.
_TALKERS = ("torch.fx.experimental.symbolic_shapes", "torch.export")


def export_program(program: Program) -> ExportedProgram:
    """Exports `program` with all its axes dynamic and runs the result at another shape, in torch.

    Raises:
        EngineError: the module cannot be exported, or the export computes something else at another shape; a size was baked in.
    """
    program.eval()
    inputs = program.example(program.example_extents)
    try:
        with quiet(*_TALKERS), _explicit_signature(program), _rewritten(), torch.no_grad(), quick_tracing():
            exported = export(program, args=(), kwargs=inputs, dynamic_shapes=_dynamic_shapes(program), strict=False)
    except Exception as error:  # whatever the tracer raises means the same: this model has no export
        reason = " ".join(str(error).split())[:500]
        raise EngineError(f"{program.component}: torch.export failed: {reason}") from error
    for extents in program.check_extents():
        _check(program, exported, extents)
    return exported


def quick_tracing() -> AbstractContextManager[Any]:
    """Traces without torch's cache of what operators give for fake tensors.

    To check an entry before it is kept, the cache makes every result a second time, and with it all the algebra of symbolic
    sizes. Without it the export of a step of SANA takes 6.5 s instead of 13.8.
    """
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def _dynamic_shapes(program: Program) -> dict[str, dict[int, object]]:
    """Per input, the dynamic dimensions; an axis of cells of several elements is a multiple of a hidden dimension."""
    dims: dict[str, Any] = {}
    for axis in program.axes.values():
        if axis.multiple == 1:
            dims[axis.name] = Dim(axis.name, min=axis.min, max=axis.max)
        else:
            cells = Dim(f"{axis.name}_cells", min=axis.min // axis.multiple, max=axis.max // axis.multiple)
            dims[axis.name] = axis.multiple * cells

    def dim(size: str) -> object:
        factor, name = factor_and_name(size)
        return dims[name] if factor == 1 else factor * dims[name]

    return {
        spec.name: {index: dim(size) for index, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in program.inputs
    }


@contextmanager
def _explicit_signature(program: Program) -> Iterator[None]:
    """Names every input in the signature of `forward`: the exporter cannot give dynamic shapes to what `**conditions` takes."""

    def forward(**inputs: torch.Tensor) -> Any:
        return type(program).forward(program, **inputs)

    parameters = [inspect.Parameter(spec.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for spec in program.inputs]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    program.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del program.forward


@contextmanager
def _rewritten() -> Iterator[None]:
    """Says while tracing what the ONNX exporter would not get right as it stands."""
    with _RepeatsAsExpansions(), _JoinsOfOneType():
        yield


class _RepeatsAsExpansions(TorchFunctionMode):
    """Says `repeat_interleave(n)` as an expansion while tracing: of the former, the ONNX exporter gets a symbolic n wrong."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.repeat_interleave, torch.repeat_interleave):
            rows, repeats, dim = (*args, *(kwargs[name] for name in ("repeats", "dim") if name in kwargs), None)[:3]
            if isinstance(repeats, int | torch.SymInt) and isinstance(dim, int):
                dim %= rows.ndim
                sizes = [-1] * rows.ndim
                sizes.insert(dim + 1, repeats)  # type: ignore[arg-type]
                repeated = rows.unsqueeze(dim + 1).expand(*sizes).flatten(dim, dim + 1)
                # A copy of its own: of a view's strides, the exporter would ask what it cannot prove for every n.
                return repeated.clone(memory_format=torch.contiguous_format)
        return func(*args, **kwargs)


class _JoinsOfOneType(TorchFunctionMode):
    """Casts what `torch.cat` joins to one type while tracing: torch promotes by itself, ONNX's operator takes one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.cat, torch.concat, torch.concatenate) and args and len({part.dtype for part in args[0]}) > 1:
            promoted = reduce(torch.promote_types, (part.dtype for part in args[0]))
            args = ([part.to(promoted) for part in args[0]], *args[1:])
        return func(*args, **(kwargs or {}))


def _check(program: Program, exported: ExportedProgram, extents: Mapping[str, int]) -> None:
    inputs = program.example(extents, seed=1)
    expected = program.run(inputs)
    where = ", ".join(f"{name}={size}" for name, size in extents.items())
    try:
        with torch.inference_mode():
            # Guards of a trace at other sizes say nothing on the numbers, and no target keeps them.
            results = exported.module(check_guards=False)(**inputs)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineError(f"{program.component}: a size was baked in; the export does not run at {where}: {reason}") from error
    results = results if isinstance(results, tuple) else (results,)
    for (name, reference), result in zip(expected.items(), results, strict=True):
        difference = (result - reference).abs().max().item() if result.shape == reference.shape else float("nan")
        scale = max(1.0, reference.abs().max().item())
        if not difference <= 1e-4 * scale:
            raise EngineError(
                f"{program.component}: the export differs from its module at {where}: {name} is off by {difference:.1e}"
            )
