"""A service's adapters: loaded, replaced and unloaded while requests run; and manifests that say wrong things of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from mc_runtime import EngineError, RequestError, Runtime
from mc_runtime.backends.onnxruntime import OnnxRuntimeBackend
from mc_runtime.bundle.store import open_bundle
from mc_runtime.cli.main import cli
from mc_runtime.cli.options import Lora
from mc_runtime.errors import BundleError
from mc_runtime.media import read_metadata
from tests.runtime.fake_bundle import LORA_LAYERS, write_fake_bundle

PROMPT = "a red circle"
RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("lora") / "bundle", lora_rank=RANK)


def adapter(path: Path, value: float, layer: str = LORA_LAYERS["step"]) -> Path:
    numbers = {"A": np.full((1, 3), value, np.float32), "B": np.ones((2, 1), np.float32)}
    save_file({f"{layer}.lora_{side}.weight": array for side, array in numbers.items()}, path)
    return path


def latents(runtime: Runtime, **options: Any) -> np.ndarray:
    return runtime.generate(PROMPT, output="latents", **options).latents


@pytest.mark.parametrize(("text", "scale"), [("a:.5", 0.5), ("a:1e-1", 0.1), ("a:-2", -2.0), ("a:+1.", 1.0), ("a", 1.0)])
def test_scales_on_the_command_line(text: str, scale: float) -> None:
    assert Lora().convert(text, None, None) == (Path("a"), scale)


def test_a_picture_says_every_adapter_it_was_made_with(folder: Path, tmp_path: Path) -> None:
    """PEFT and diffusers give every adapter's file one name: then its folders tell them apart. One given twice counts twice."""
    given: list[str] = []
    for place in ("lake/style", "night/style", "own"):
        (tmp_path / place).mkdir(parents=True)
        given += ["--lora", f"{adapter(tmp_path / place / 'weights.safetensors', 0.1)}:0.5"]
    adapter(tmp_path / "other.safetensors", 0.1)

    def said(*loras: str) -> Any:
        out = tmp_path / "out.png"
        result = CliRunner().invoke(cli, ["generate", str(folder), PROMPT, "-o", str(out), *loras])
        assert result.exit_code == 0, result.output
        return read_metadata(out)["lora"]

    places = ("lake/style", "night/style", f"{tmp_path.name}/own")
    assert said(*given) == {f"{place}/weights.safetensors": 0.5 for place in places}
    assert said(*given[2:]) == {"style/weights.safetensors": 0.5, "own/weights.safetensors": 0.5}
    other = ("--lora", f"{tmp_path}/other.safetensors:-1")
    assert said(*given[:2], *other) == {"weights.safetensors": 0.5, "other.safetensors": -1}
    assert said(*given[:2], *given[:2]) == {"weights.safetensors": 1.0}


def test_threads_load_replace_unload_and_generate_at_once(folder: Path, tmp_path: Path) -> None:
    """Each thread gets its own adapter's picture, or is told that the shared one is not there; nothing else."""
    runtime = Runtime.load(folder, threads=1)
    files = [adapter(tmp_path / f"{index}.safetensors", 0.1 * (index + 1)) for index in range(4)]
    expected = []
    for file in files:
        expected.append(latents(runtime, lora=runtime.load_lora(file)))
        runtime.unload_lora(file.stem)
    assert not np.array_equal(expected[0], expected[1])

    told: list[str] = []

    def serve(index: int) -> None:
        for _ in range(15):
            name = runtime.load_lora(files[index], f"own {index}")
            runtime.load_lora(files[index], "shared")
            assert np.array_equal(latents(runtime, lora=name), expected[index])
            try:
                shared = latents(runtime, lora="shared")
                assert any(np.array_equal(shared, one) for one in expected)
                runtime.unload_lora("shared")
            except RequestError as error:
                told.append(str(error))
            runtime.unload_lora(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, range(4)))
    assert set(runtime.loras) <= {"shared"}
    assert all("no LoRA 'shared' is loaded" in one for one in told)


def test_what_is_unloaded_or_replaced_is_let_go(folder: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(folder, threads=1)
    one = runtime.load_lora(adapter(tmp_path / "one.safetensors", 0.5))
    other = runtime.load_lora(adapter(tmp_path / "other.safetensors", 0.25, LORA_LAYERS["planner"]))
    for scale in (0.5, 1.0):
        runtime._loras.active({one: scale, other: 1.0})
    runtime._loras.active(other)
    runtime.load_lora(tmp_path / "one.safetensors", one)
    assert len(runtime._loras._stacks) == 1
    runtime.unload_lora(other)
    assert not runtime._loras._stacks


def test_choices_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(folder, threads=1)
    name = runtime.load_lora(adapter(tmp_path / "one.safetensors", 0.5), "a\x1b[31m\nb")
    cases: list[Any] = [[["one"]], [name, name], {name: float("nan")}, {name: 101}, {name: "1"}, {1: 1.0}, 3, None, ["one"]]
    for choice in cases:
        with pytest.raises(RequestError) as caught:
            runtime.generate(PROMPT, lora=choice)
        assert str(caught.value).isprintable()


def test_numbers_that_an_adapter_makes_infinite_name_its_scale(folder: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(folder, threads=1)
    planners = {"A": np.full((4, 3), 9e29, np.float32), "B": np.full((2, 4), 9e29, np.float32)}
    save_file(
        {f"{LORA_LAYERS['planner']}.lora_{side}.weight": array for side, array in planners.items()},
        tmp_path / "large.safetensors",
    )
    name = runtime.load_lora(tmp_path / "large.safetensors")
    with pytest.raises(EngineError, match="lower the scales of the LoRAs"):
        runtime.generate(PROMPT, lora=name)
    assert np.isfinite(latents(runtime)).all()


def edited(folder: Path, place: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The bundle with its manifest changed."""
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).symlink_to(file)
    document = json.loads((folder / "manifest.json").read_text())
    change(document)
    (place / "manifest.json").unlink()
    (place / "manifest.json").write_text(json.dumps(document))
    return place


def test_engines_of_adapters_that_could_not_stand_in_are_refused(folder: Path, tmp_path: Path) -> None:
    def of_step(document: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = document["engines"]["step_lora"]
        return found

    def listed_twice(document: dict[str, Any]) -> None:
        group = of_step(document)["lora"][0]
        group["layers"] *= 2
        for tensor in of_step(document)["inputs"][-2:]:
            tensor["shape"][0] = 2

    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "needs layers to adapt": lambda document: of_step(document).update(lora=[], inputs=of_step(document)["inputs"][:-2]),
        "takes or gives something else": lambda document: of_step(document)["inputs"][0]["shape"].__setitem__(1, 8),
        "no request runs it": lambda document: document["engines"].update(vae_decoder_lora=document["engines"]["vae_decoder"]),
        "listed twice": listed_twice,
        "has no input": lambda document: of_step(document)["lora"][0].update(rank=8),
        "expected layers, a rank": lambda document: of_step(document)["lora"][0].update(rank=-1),
        "sizes, names or multiples": lambda document: of_step(document)["inputs"][0]["shape"].__setitem__(2, "0*H"),
        "files: '../step_lora' is not a plain path": lambda document: document["files"].update(
            {"../step_lora": document["files"]["tokenizer.json"]}
        ),
    }
    for index, (said, change) in enumerate(changes.items()):
        with pytest.raises(BundleError) as caught:
            open_bundle(edited(folder, tmp_path / str(index), change))
        assert said in str(caught.value)
        assert str(caught.value).isprintable()


def test_a_file_of_other_sizes_than_the_manifest_says_is_not_run(folder: Path, tmp_path: Path) -> None:
    def wider(document: dict[str, Any]) -> None:
        for name in ("step", "step_lora"):
            (canvas,) = (one for one in document["engines"][name]["inputs"] if one["name"] == "canvas")
            canvas["shape"][-1] += 1

    runtime = Runtime.load(edited(folder, tmp_path / "wider", wider), threads=1)
    with pytest.raises(BundleError, match=r"canvas is \[.*\] where the manifest says"):
        runtime.generate(PROMPT)


def test_dimensions_that_no_request_has_are_refused(folder: Path, tmp_path: Path) -> None:
    def renamed(document: dict[str, Any]) -> None:
        for name in ("step", "step_lora"):
            document["engines"][name]["inputs"][2]["shape"] = ["Q"]

    runtime = Runtime.load(edited(folder, tmp_path / "renamed", renamed), threads=1)
    with pytest.raises(BundleError, match="nothing of a request has the dimension 'Q'"):
        runtime.generate(PROMPT)


def test_engines_that_failed_behind_another_ones_failure_are_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request ends with the planner's failure and never asks for the step's; the second must not meet that one."""
    runtime = Runtime.load(folder, threads=1)
    load, full = OnnxRuntimeBackend.load, threading.Event()

    def load_if_there_is_room(self: OnnxRuntimeBackend, component: str, *arguments: Any) -> Any:
        if full.is_set():
            raise EngineError(f"{component} engine: the GPU's memory is full")
        return load(self, component, *arguments)

    monkeypatch.setattr(OnnxRuntimeBackend, "load", load_if_there_is_room)
    full.set()

    def told(_: int) -> bool:
        with pytest.raises(EngineError, match="memory is full"):
            runtime.generate(PROMPT)
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(told, range(12)))
    full.clear()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: latents(runtime), range(6)))
    assert all(np.array_equal(one, found[0]) for one in found)
