"""docs/support.md says what the specs say."""

from __future__ import annotations

from pathlib import Path

from mc_export.backbones.registry import BACKBONES
from mc_export.support import support_page
from mc_runtime.tasks.registry import TASKS

PAGE = Path(__file__).parents[3] / "docs" / "support.md"


def test_the_page_is_what_the_specs_say() -> None:
    mend = "run `python -m mc_export.support > docs/support.md`"
    assert PAGE.read_text(encoding="utf-8") == support_page(), mend


def test_every_task_of_a_spec_is_one_that_can_be_asked_for() -> None:
    assert {task for backbone in BACKBONES for task in backbone.tasks} <= set(TASKS)
