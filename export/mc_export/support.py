"""The table of docs/support.md, from the specs of the backbones.

python -m mc_export.support > docs/support.md
"""

from __future__ import annotations

from collections.abc import Sequence

from mc_export.backbones.base import Backbone
from mc_export.backbones.registry import BACKBONES
from mc_export.build.options import PRECISIONS

_HEAD = """# What is supported

Written by `python -m mc_export.support > docs/support.md` from the specs in `export/mc_export/backbones/`; a test
compares. A MetaCanvas checkpoint names its own tasks in `metacanvas.json`; a stock pipeline has those below.

## Backbones
"""
_TESTS = """
`make test` holds every backbone, with random projections, to a plain loop, and its programs to diffusers' pipelines, in torch.
`make test-all` builds them too: every step through onnxruntime in fp32 (2e-5) and OpenVINO in fp32 and bf16, and a whole bundle
of each stock pipeline against diffusers' own, from the same latents (1e-3 of their range; pictures to the rounding of a byte).

## Targets
"""
_QUALITY = """
What a trained model keeps in int8 and bf16 was measured on SANA, with the demo (examples/shapes/README.md). Of the other
backbones no trained checkpoint was at hand; whether they build in int8, or with `inductor`, was not tried. Nothing was measured
on a GPU.
"""


def support_page() -> str:
    """The whole of docs/support.md."""
    rows = [_row(backbone) for backbone in BACKBONES]
    head = ("backbone", "diffusers model", "pipelines", "stock tasks", "context", "told beside it", "guidance")
    targets = [(target, ", ".join(precisions)) for target, precisions in PRECISIONS.items()]
    return _HEAD + _table(head, rows) + _TESTS + _table(("target", "precisions"), targets) + _QUALITY


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
        context,
        "sizes, pictures or scales, see [conditions](bundle.md#conditions)" if _is_told(backbone) else "",
        _guidance(backbone),
    )


def _is_told(backbone: Backbone) -> bool:
    return type(backbone).conditions is not Backbone.conditions


def _guidance(backbone: Backbone) -> str:
    if backbone.embeds_guidance:
        return "the model is told the scale"
    ramp = backbone.guidance_ramp_from
    return f"{backbone.guidance_branches} branches" + ("" if ramp is None else f", from {ramp:g} at the first frame on")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(support_page(), end="")
