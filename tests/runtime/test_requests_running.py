"""What a request tells while it runs, how it is stopped, and what it says when something is wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime import BundleError, Cancelled, EngineError, Plan, RequestError, Runtime, Step
from mc_runtime.bundle.manifest import Sampler
from mc_runtime.bundle.store import describe_files, open_bundle, write_manifest
from tests.runtime.fake_bundle import CANVAS, CONTEXT, ORDER, sampler_table, write_fake_bundle

PROMPT, OTHER = "a red circle", "a blue square left"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def runtime(folder: Path) -> Runtime:
    return Runtime.load(write_fake_bundle(folder / "shared"), threads=1)


def test_plan_of_another_bundle_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    other = Runtime.load(write_fake_bundle(tmp_path / "bundle", name="another"), threads=1)
    with pytest.raises(RequestError, match="another bundle"):
        runtime.render(other.plan(PROMPT))


def test_prompt_over_the_planners_limit(runtime: Runtime) -> None:
    for call in (runtime.plan, runtime.generate):
        with pytest.raises(RequestError, match="limit is 8"):
            call("red " * 7)


def test_nothing_is_loaded_for_a_request_that_is_refused(tmp_path: Path) -> None:
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle"), threads=1)
    for arguments in ({"prompt": "red " * 7}, {"steps": 0}, {"cancel": 3}, {"on_step": 3}):
        with pytest.raises(RequestError):
            runtime.generate(**{"prompt": PROMPT, **arguments})
    assert runtime._engines._loading == {}


def test_plan_takes_one_prompt(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match="one prompt"):
        runtime.plan([PROMPT])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="multiples of 8"):
        runtime.plan(PROMPT, size=(33, 32))


def test_steps_are_reported(runtime: Runtime) -> None:
    steps: list[Step] = []
    seen: list[np.ndarray] = []

    def on_step(step: Step) -> None:
        steps.append(step)
        seen.append(step.latents())

    result = runtime.generate(PROMPT, steps=3, on_step=on_step)
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert [step.timestep for step in steps] == list(sampler_table().schedule(3).timesteps)
    np.testing.assert_array_equal(seen[-1], result.latents)
    assert not np.array_equal(seen[0], seen[1])


def test_cancel_between_steps(runtime: Runtime) -> None:
    event = threading.Event()
    done: list[int] = []

    def on_step(step: Step) -> None:
        done.append(step.index)
        if step.index == 1:
            event.set()

    with pytest.raises(Cancelled, match="after 2 steps") as caught:
        runtime.generate(PROMPT, steps=5, on_step=on_step, cancel=event)
    assert done == [0, 1]
    assert caught.value.exit_code == 130
    with pytest.raises(Cancelled):
        runtime.generate(PROMPT, cancel=lambda: True)
    assert runtime.generate(PROMPT, cancel=lambda: False).images


def test_error_of_the_caller_passes_through(runtime: Runtime) -> None:
    def on_step(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runtime.generate(PROMPT, on_step=on_step)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_first_step_that_is_not_finite_is_named(tmp_path: Path, target: str) -> None:
    # Of 4 steps at timesteps 1000, 750, 500 and 250, the third is the first below 600.
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle", target=target, nan_below=600), threads=1)
    with pytest.raises(EngineError, match=r"step 3 of 4: .*not finite.*fp32"):
        runtime.generate(PROMPT, num_images=2)


def test_plan_that_is_not_finite_is_an_engine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.load(write_fake_bundle(tmp_path / "bundle"), threads=1)
    runtime.plan(PROMPT)
    broken = lambda buffer: np.full(buffer.shape, np.nan, buffer.dtype)  # noqa: E731
    monkeypatch.setattr(runtime._engines.get("planner").backend, "to_host", broken)
    with pytest.raises(EngineError, match="planner engine: its output"):
        runtime.plan(OTHER)


def test_engine_that_is_not_what_the_manifest_says(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    engines = dict(open_bundle(bundle).manifest.engines)
    engines["vae_decoder"] = replace(engines["vae_decoder"], files=engines["planner"].files)
    write_fake_bundle(bundle, engines=engines)
    with pytest.raises(BundleError, match=r"inputs .* where the manifest says \['latents'\]"):
        Runtime.load(bundle).warm_up()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "int64"}, "latents is float32 where the manifest says int64"),
        ({"shape": ("B", "h", "w", 1)}, r"pixels is \[.*, 3\] where the manifest says \['B', 'h', 'w', 1\]"),
        ({"shape": ("B", 1, "w", 3)}, r"has the shape \[1, 32, 32, 3\] where the manifest says \['B', 1, 'w', 3\]"),
    ],
)
def test_engine_whose_tensors_are_others_than_the_manifest_says(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    engines = dict(open_bundle(bundle).manifest.engines)
    decoder = engines["vae_decoder"]
    side = "inputs" if "dtype" in change else "outputs"
    engines["vae_decoder"] = replace(decoder, **{side: (replace(getattr(decoder, side)[0], **change),)})
    write_fake_bundle(bundle, engines=engines)
    with pytest.raises((BundleError, EngineError), match=says):
        Runtime.load(bundle).generate(PROMPT)


def test_sampler_that_is_another_than_the_manifest_says(tmp_path: Path) -> None:
    sampler = Sampler(file="sampler.safetensors", scheduler="Fake", order=ORDER + 1, dynamic_shift=False)
    bundle = write_fake_bundle(tmp_path / "bundle", sampler=sampler)
    with pytest.raises(BundleError, match=r"sampler\.safetensors: another sampler than the manifest's"):
        Runtime.load(bundle).generate(PROMPT)


@pytest.mark.parametrize(
    "change",
    [
        {"context": None},
        {"context": np.zeros((3, len(CONTEXT) + 1), np.float32)},
        {"context": np.zeros((3, len(CONTEXT)), np.float64)},
        {"context": np.full((3, len(CONTEXT)), np.nan, np.float32)},
        {"context": np.zeros(3, np.float32)},
        {"context": np.zeros((0, len(CONTEXT)), np.float32), "context_mask": np.zeros(0, np.int64)},
        {"context_mask": np.ones(2, np.int64)},
        {"context_mask": np.ones(3, np.float32)},
        {"canvas": None},
        {"canvas": np.zeros((1, 2, 2, len(CANVAS) + 1), np.float32)},
        {"canvas": np.zeros((2, 2, len(CANVAS)), np.float32)},
    ],
)
def test_stored_plan_that_the_step_engine_does_not_take(tmp_path: Path, change: dict[str, Any]) -> None:
    stored = {
        "context": np.zeros((3, len(CONTEXT)), np.float32),
        "context_mask": np.ones(3, np.int64),
        "canvas": np.zeros((1, 2, 2, len(CANVAS)), np.float32),
    }
    arrays = {name: array for name, array in (stored | change).items() if array is not None}
    bundle = write_fake_bundle(tmp_path / "bundle", empty_plan=arrays)
    with pytest.raises(BundleError, match=rf"empty\.safetensors: {next(iter(change))} is not"):
        Runtime.load(bundle).generate(PROMPT)


def test_tokenizer_that_cannot_read_the_prompt(tmp_path: Path) -> None:
    bundle = write_fake_bundle(tmp_path / "bundle")
    text = (bundle / "tokenizer.json").read_text()
    (bundle / "tokenizer.json").write_text(text.replace('"<unk>"', '"<UNK>"', 1))
    write_manifest(bundle, replace(open_bundle(bundle).manifest, files=describe_files(bundle)))
    with pytest.raises(BundleError, match=r"tokenizer\.json: cannot read this prompt"):
        Runtime.load(bundle).generate("unheard of")


def test_threads_may_share_a_runtime(runtime: Runtime) -> None:
    alone = [runtime.generate(PROMPT, seed=seed, output="latents") for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda seed: runtime.generate(PROMPT, seed=seed, output="latents"), range(6)))
    assert all(one.latents.tobytes() == other.latents.tobytes() for one, other in zip(alone, results, strict=True))


def test_timings_cover_the_request(runtime: Runtime) -> None:
    timings = runtime.generate(PROMPT).timings
    assert set(timings) == {"load", "plan", "denoise", "decode", "pixels", "engines", "total"}
    stages = sum(timings[name] for name in ("load", "plan", "denoise", "decode", "pixels"))
    assert 0 < timings["engines"] <= stages <= timings["total"]


@pytest.mark.parametrize("threads", [10**12, pytest.param(10**5000, id="endless"), 0, -1, 1.5, True, "2"])
def test_threads_are_checked(tmp_path: Path, threads: Any) -> None:
    with pytest.raises(RequestError, match="threads"):
        Runtime.load(tmp_path, threads=threads)


@pytest.mark.parametrize("path", [None, 3, b"bundle"])
def test_a_bundle_is_named_by_a_path(path: Any) -> None:
    with pytest.raises(BundleError, match="named by its directory"):
        Runtime.load(path)


def test_where_engines_are_kept_is_a_path(folder: Path, runtime: Runtime) -> None:
    with pytest.raises(RequestError, match="cache_dir must be a path"):
        Runtime.load(folder / "shared", cache_dir=3)  # type: ignore[arg-type]


def test_only_a_plan_is_rendered(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match="what plan returned, got 'a red circle'"):
        runtime.render(PROMPT)  # type: ignore[arg-type]


def test_unknown_device(folder: Path, runtime: Runtime) -> None:
    with pytest.raises(RequestError, match="run on cpu"):
        Runtime.load(folder / "shared", device="toaster")


def test_public_names() -> None:
    import mc_runtime

    assert {name for name in mc_runtime.__all__ if not hasattr(mc_runtime, name)} == set()
    assert mc_runtime.Plan is Plan
    with pytest.raises(AttributeError, match="Nonsense"):
        mc_runtime.Nonsense  # noqa: B018
