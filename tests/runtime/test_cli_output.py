"""Numbers as a person says them, and progress that keeps quiet where nobody watches."""

from __future__ import annotations

import pytest

from mc_runtime.cli.output import progress_bar, seconds, size_of


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0042, "4.2 ms"), (0.42, "0.42 s"), (12.34, "12.3 s"), (200, "3 min 20 s"), (119.6, "2 min 00 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_999, "1.0 MB"), (14_200_000, "14.2 MB"), (3 * 10**15, "3000.0 TB")],
)
def test_size_of(count: int, text: str) -> None:
    assert size_of(count) == text


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working") as progress:
        progress(1, 2, "half")
    assert capsys.readouterr() == ("", "")


def test_progress_draws_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bar("working") as progress:
        progress(1, 2, "half")
    out, err = capsys.readouterr()
    assert out == ""
    assert "half" in err
