"""The tables of docs/support.md, from the specs of the backbones.

python -m mc_export.support > docs/support.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mc_export.backbones.base import Backbone
from mc_export.backbones.registry import BACKBONES
from mc_export.build.options import PRECISIONS
from mc_runtime.bundle.manifest import Precision

BOUNDS: Mapping[Precision, float] = MappingProxyType(
    {Precision.FP32: 2e-5, Precision.FP16: 0.1, Precision.BF16: 0.1, Precision.INT8: 0.25}
)
"""Largest relative L2 error of a tiny random checkpoint's final latents, against torch in fp32, in the tests of the matrix.

Below fp32 it says that a bundle is sane, not how good it is: random weights forgive nothing and mean nothing."""

GPU_TARGETS = ("inductor-cuda", "tensorrt", "tensorrt-rtx")
"""Targets that run on a GPU only."""

_HEAD = """# What is supported

Written by `python -m mc_export.support > docs/support.md` from the specs in `export/mc_export/backbones/`; a test
compares. A MetaCanvas checkpoint names its own tasks in `metacanvas.json`, of those below; another is an error.

## Backbones
"""
_TESTS = """
`make test` runs every backbone with a canvas in every task, with its engines as torch programs, against the reference pipeline:
two results at once, two odd sizes, guidance on and off, random projections; final latents within 1e-4 of their range.

## Targets and precisions
What `make test-all` builds and runs of every backbone, stock and MetaCanvas, in every task: final latents of tiny random
checkpoints against torch in fp32, relative L2 at most

"""
_NOTES = """
In fp32 pictures are the same to one level of 255, and stock bundles are held to diffusers' own pipelines besides. Below fp32
the bound says that a bundle is sane, not how good it is. With `inductor`, where every engine takes minutes to compile, it is
the MetaCanvas `step` that is compiled; the other engines are onnxruntime's. A bound here is what the test demands; what was
measured of which cell is in [the matrix](matrix.md).
"""
_QUALITY = """
What a trained model keeps in int8 and bf16 was measured with the demos (examples/shapes/README.md).
What was built with `tensorrt-rtx` is in [TensorRT](tensorrt.md).
"""


def support_page() -> str:
    """The whole of docs/support.md."""
    rows = [_row(backbone) for backbone in BACKBONES]
    head = ("backbone", "diffusers model", "pipelines", "stock tasks", "MetaCanvas tasks", "context", "guidance")
    return _HEAD + markdown_table(head, rows) + _caching() + _TESTS + _matrix() + _NOTES + _gpu() + _QUALITY


def _row(backbone: Backbone) -> tuple[str, ...]:
    context = (
        "a picture's embedding"
        if backbone.image_encoder
        else f"{len(backbone.encoders)} text encoder" + "s" * (len(backbone.encoders) > 1)
    )
    pipelines = ", ".join(f"`{name}`" for name in backbone.pipelines) or "any"
    return (
        backbone.name,
        ", ".join(f"`{name}`" for name in backbone.model_classes),
        pipelines,
        ", ".join(backbone.tasks),
        ", ".join(backbone.canvas_tasks),
        context,
        _guidance(backbone),
    )


def _caching() -> str:
    """Which backbones a step of can be cut behind its first block, and why others' cannot."""
    cut = ", ".join(backbone.name for backbone in BACKBONES if backbone.stream is not None)
    reasons: dict[str, list[str]] = {}
    for backbone in BACKBONES:
        if backbone.stream is None:
            reasons.setdefault(backbone.uncut, []).append(backbone.name)
    refused = "".join(f" Not {', '.join(names)}: {reason}." for reason, names in reasons.items())
    return f"\n[Step caching](cache.md) is there for {cut}.{refused}\n"


def _guidance(backbone: Backbone) -> str:
    if backbone.embeds_guidance:
        return "the model is told the scale; a negative prompt has its own"
    ramp = backbone.guidance_ramp_from
    return f"{backbone.guidance_branches} branches" + ("" if ramp is None else f", from {ramp:g} at the first frame on")


def _matrix() -> str:
    """Backbones by targets and precisions: the bound, or the reason why not."""
    columns = [(target, one) for target, there in PRECISIONS.items() if target not in GPU_TARGETS for one in there]
    reasons: list[str] = []

    def cell(backbone: Backbone, target: str, precision: Precision) -> str:
        limits = [limit for limit in backbone.limits if (limit.target, limit.precision) == (target, precision)]
        for limit in limits:
            if limit.reason not in reasons:
                reasons.append(limit.reason)
        notes = "".join(f"; not its `{limit.component}` ({1 + reasons.index(limit.reason)})" for limit in limits)
        return f"{BOUNDS[precision]:g}{notes}"

    rows = [(backbone.name, *(cell(backbone, *column) for column in columns)) for backbone in BACKBONES]
    table = markdown_table(("backbone", *(f"{target} {precision}" for target, precision in columns)), rows)
    return table + "".join(f"\n{1 + index}. {reason[0].upper()}{reason[1:]}." for index, reason in enumerate(reasons))


def _gpu() -> str:
    named = "; ".join(f"`{target}` in {', '.join(PRECISIONS[target])}" for target in GPU_TARGETS)
    return f"\nFor a GPU there is {named}. Nothing of it was run on one.\n"


def markdown_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A head and its rows."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(support_page(), end="")
