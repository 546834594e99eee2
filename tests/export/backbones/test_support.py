"""docs/support.md says what the specs say."""

from __future__ import annotations

from pathlib import Path

import pytest

from mc_export.backbones.registry import BACKBONES
from mc_export.backbones.spec import Limit
from mc_export.build.limits import refuse_limited
from mc_export.build.options import PRECISIONS, BuildOptions
from mc_export.support import support_page
from mc_runtime.bundle.manifest import Precision
from mc_runtime.errors import RequestError
from mc_runtime.tasks.registry import TASKS

PAGE = Path(__file__).parents[3] / "docs" / "support.md"


def test_the_page_is_what_the_specs_say() -> None:
    mend = "run `python -m mc_export.support > docs/support.md`"
    assert PAGE.read_text(encoding="utf-8") == support_page(), mend


def test_every_task_of_a_spec_is_one_that_can_be_asked_for() -> None:
    assert {task for backbone in BACKBONES for task in (*backbone.tasks, *backbone.canvas_tasks)} <= set(TASKS)
    assert all(set(backbone.tasks) <= set(backbone.canvas_tasks) for backbone in BACKBONES)


def test_a_limit_is_shown_and_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sana = BACKBONES[0]
    limits = (Limit("openvino", Precision.INT8, "its weights are too few"), Limit("openvino", Precision.BF16, "it is dim"))
    monkeypatch.setattr(type(sana), "limits", limits)
    page = support_page()
    assert "; not its `step` (1) |" in page
    assert "\n2. Its weights are too few." in page
    refuse_limited(sana, ["step"], BuildOptions(target="openvino"))
    refuse_limited(sana, ["vae_decoder"], BuildOptions(target="openvino", precision=Precision.INT8))
    with pytest.raises(RequestError, match=r"step cannot be openvino int8: its weights .*; .* --engine step=openvino:fp32$"):
        refuse_limited(sana, ["planner", "step"], BuildOptions(target="openvino", precision=Precision.INT8))


def test_limits_are_of_targets_and_precisions_that_there_are() -> None:
    for backbone in BACKBONES:
        for limit in backbone.limits:
            assert limit.precision in PRECISIONS[limit.target]
            assert not limit.reason.endswith(".")
