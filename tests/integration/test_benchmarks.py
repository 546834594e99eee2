"""The benchmark scripts run at a tiny size, and the numbers they check are checked. Nothing here asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import canvas_cost, checkpoints, end_to_end, mid, models, page, process, real, report, startup
from benchmarks.contestants import Drawn
from mc_export.reference.prompts import chat_text
from tests.factories import tiny_metacanvas_checkpoint

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def end_to_end_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path, Path]:
    """A whole run over the tiny checkpoint with two bundles; the folders of its work and of its report."""
    work, results = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("results")
    arguments = ["--size=tiny", "--quick", "--threads=1", f"--work={work}", f"--results={results}"]
    return end_to_end.main(arguments), work, results


@pytest.mark.slow
def test_end_to_end_checks_every_picture_before_it_times(end_to_end_report) -> None:
    found, _, results = end_to_end_report
    contestants = found["contestants"]
    assert set(contestants) == {"torch eager fp32", "onnxruntime fp32", "openvino bf16"}
    assert found["left_out"] == {}
    assert contestants["onnxruntime fp32"]["check"]["latents_relative_l2"] < 1e-4
    assert 1e-4 < contestants["openvino bf16"]["check"]["latents_relative_l2"] < 0.1
    for name, entry in contestants.items():
        assert {"plan", "denoise", "decode", "total"} <= set(entry["seconds"]), name
        assert entry["ratio"] > 0
    assert 0 < contestants["onnxruntime fp32"]["host_share"] < 1
    assert json.loads((results / "tiny-quick.json").read_text())["contestants"].keys() == contestants.keys()
    assert found["machine"]["cores"] >= 1
    assert "onnxruntime" in found["versions"]


@pytest.mark.slow
def test_startup_compares_two_processes_that_draw_the_same_picture(end_to_end_report, tmp_path: Path) -> None:
    _, work, _ = end_to_end_report
    bundle = next((work / "bundles").glob("*-onnxruntime-fp32"))
    checkpoint = next(work.glob("*/tiny-metacanvas"))
    found = startup.main([f"--bundle={bundle}", f"--checkpoint={checkpoint}", "--rounds=1", f"--results={tmp_path}"])
    assert found["picture_mean_error"] < 1
    for entry in found["contestants"].values():
        assert entry["peak_bytes"] > 1 << 20
    assert (tmp_path / "startup.json").is_file()


@pytest.mark.slow
def test_real_counts_its_steps(end_to_end_report) -> None:
    _, work, _ = end_to_end_report
    bundle = next((work / "bundles").glob("*-onnxruntime-fp32"))
    checkpoint = next(work.glob("*/tiny-metacanvas"))
    for what, path in (("bundle", bundle), ("torch eager fp32", checkpoint)):
        found = real.run_child(what, path, steps=3, threads=1)
        assert len(found["steps"]) == 3
        assert min(found["plan"], found["decode"], found["load"]) > 0


def test_a_process_that_fails_says_why_and_one_that_takes_too_much_is_ended() -> None:
    with pytest.raises(RuntimeError, match="ended with 3: so it is"):
        process.run(["bash", "-c", "echo so it is; exit 3"])
    with pytest.raises(process.MemoryRanOutError, match="GiB resident"):
        process.run(["sleep", "60"], keep_free=1 << 60)


def test_the_mid_prompt_fills_the_planner_to_320_rows() -> None:
    prompt = checkpoints.long_prompt(models.MID)
    tokenizer, _ = models.planner_processors()
    tokens = tokenizer(chat_text(tokenizer, models.canvas_config(models.MID), prompt)).input_ids
    assert len(tokens) + models.MID.canvas_cells**2 == 320


def test_the_real_size_is_sana_1_6b() -> None:
    assert (models.REAL.backbone.width, models.REAL.pixels, models.REAL.autoencoder.pixels_per_cell) == (2240, 1024, 32)


def test_random_checkpoints_are_made_once(tmp_path: Path) -> None:
    made = []

    def write(folder: Path) -> dict[str, int]:
        made.append(tiny_metacanvas_checkpoint(folder))
        return {"all": 1}

    folder = checkpoints._made(tmp_path / "tiny", write)
    assert checkpoints._made(folder, write) == folder
    assert len(made) == 1


def test_differences_are_measured_and_broken_latents_are_refused() -> None:
    reference = Drawn(np.full((1, 2, 3, 3), 2.0, np.float32), np.full((6, 6, 3), 100, np.uint8))
    other = Drawn(reference.latents + np.float32(0.5), np.full((6, 6, 3), 97, np.uint8))
    found = end_to_end.difference(other, reference)
    assert found == pytest.approx(
        {"latents_relative_l2": 0.25, "latents_max_abs": 0.5, "picture_mean_error": 3, "picture_max_error": 3}
    )
    with pytest.raises(ValueError, match="cannot be compared"):
        end_to_end.difference(Drawn(reference.latents * np.nan, reference.pixels), reference)


def test_bars_take_the_best_openvino_bundle_whose_picture_passes() -> None:
    def entry(ratio: float, error: float) -> dict:
        return {"ratio": ratio, "check": {"picture_mean_error": error}, "host_share": 0.01}

    contestants = {
        "onnxruntime fp32": entry(1.0, 0.1),
        "openvino int8": entry(6.0, end_to_end.PICTURE_GATE + 1),
        "openvino bf16": entry(4.5, 1.0),
    }
    bars = {bar["what"]: bar for bar in end_to_end.bars({"checkpoint": "mid", "contestants": contestants})}
    assert not bars["onnxruntime fp32 against torch eager fp32"]["met"]
    assert bars["openvino bf16 (best openvino) against torch eager fp32"]["met"]
    assert not any("openvino int8 (best" in what for what in bars)


def test_any_target_may_be_a_backbones_best() -> None:
    def entry(ratio: float, error: float, **bundle: object) -> dict:
        return {"ratio": ratio, "check": {"picture_mean_error": error}, **bundle}

    of_bundle = {"engines": {}, "host_share": 0.01}
    contestants = {
        "torch eager bf16": entry(9.0, 0.1),
        "onnxruntime int8": entry(2.5, 1.0, **of_bundle),
        "openvino int8": entry(4.0, end_to_end.PICTURE_GATE + 1, **of_bundle),
    }
    for name, met in (("wan", False), ("svd", True)):
        bars = {bar["what"]: bar for bar in end_to_end.bars({"checkpoint": f"mid-{name}", "contestants": contestants})}
        assert bars["onnxruntime int8 (best) against torch eager fp32"]["met"] is met


def test_the_canvas_costs_what_it_adds_round_by_round() -> None:
    times = {
        "x with": [{"total": 1.1}, {"total": 2.1}, {"total": 9.0}],
        "x without": [{"total": 1.0}, {"total": 2.0}, {"total": 3.0}],
    }
    found = canvas_cost.cost_of(times, "x")
    assert found["cost"] == pytest.approx(0.1)
    assert found["cost_range"] == pytest.approx([0.05, 2.0])


def test_the_page_shows_what_there_is(tmp_path: Path) -> None:
    def entry(ratio: float, error: float, **bundle: object) -> dict:
        seconds = {stage: {"median": 12.34 / ratio} for stage in (*report.STAGES, "total")}
        return {"seconds": seconds, "ratio": ratio, "check": {"picture_mean_error": error}, **bundle}

    contestants = {
        "torch eager fp32": entry(1.0, 0.0),
        "torch compile fp32": entry(1.25, 0.0),
        "openvino bf16": entry(2.5, 0.57, host_share=0.01),
        "openvino int8": entry(4.5, 6.0, host_share=0.01),
    }
    machine = {"machine_text": "Two cores"}
    report.save("mid-wan", {"contestants": contestants, "request": {"threads": 2}, **machine}, tmp_path)
    cost = {"cost": 0.031, "seconds_without": 0.5}
    report.save("canvas-mid", {"targets": {"openvino bf16": cost}, **machine}, tmp_path)
    text = page.page(tmp_path)
    assert text.count("Two cores") == 1
    assert "| wan | 2 | 12.3 | - | 1.25, 0.00 | - | - | - | 2.50, 0.57 | (4.50, 6.00) | - |" in text
    stages = " | ".join(["4.94 of 12.34"] * 4)
    assert f"| wan | openvino bf16 | {stages} | 1.0 % | 2.50 | 2.00 | 3 | missed |" in text
    assert "| sana, 8 blocks | 3.1 % of 500 ms |" in text
    assert "Not measured yet: sana, flux-kontext, wan, sdxl, svd, animatediff." in text
    assert "Not measured yet: sana, flux-kontext, sdxl, svd, animatediff." in text


def test_the_page_is_that_of_the_results() -> None:
    assert (report.ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == page.page(report.RESULTS)


@pytest.mark.parametrize("subject", mid.SUBJECTS.values(), ids=list(mid.SUBJECTS))
def test_mid_requests_are_what_their_checkpoints_serve(subject: mid.Subject) -> None:
    height, width = subject.size
    assert subject.config.canvas.grid_at(height, width) == subject.config.canvas.grid
    assert subject.config.reads_pictures == subject.shows
    assert ("frames" in subject.media) == subject.task.endswith("video")


@pytest.mark.matrix
@pytest.mark.parametrize("name", list(mid.SUBJECTS))
def test_every_backbone_is_timed(name: str, tmp_path: Path) -> None:
    arguments = [f"--size=tiny-{name}", "--quick", "--threads=1", f"--work={tmp_path}", f"--results={tmp_path}"]
    found = end_to_end.main(arguments)
    assert found["left_out"] == {}
    assert found["contestants"]["onnxruntime fp32"]["check"]["latents_relative_l2"] < 1e-3
    assert found["contestants"]["openvino bf16"]["check"]["picture_mean_error"] < end_to_end.PICTURE_GATE


@pytest.mark.matrix
def test_the_canvas_is_timed(tmp_path: Path) -> None:
    found = canvas_cost.main(["--size=tiny-svd", "--quick", "--threads=1", f"--work={tmp_path}", f"--results={tmp_path}"])
    assert set(found["targets"]) == {"torch eager fp32", "openvino bf16"}
    assert found["extents"]["T"] == 5


def test_a_bar_is_met_from_its_limit_on() -> None:
    assert report.bar("x", 4.0, at_least=4.0)["met"]
    assert not report.bar("x", 0.26, at_most=0.25)["met"]
