"""AOTInductor packages on the CPU: a bundle's engines equal their modules, loading compiles nothing, and what is wrong is said.

Compiling takes seconds an engine, so the checkpoint has one layer here, and every package is made once: planner and step in
float32, the decoder in bf16.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mc_export.build import BuildOptions, BuildReport, EngineChoice, build_bundle
from mc_export.build.verify import verify_engine
from mc_export.checkpoint import load_checkpoint
from mc_export.reference.pipeline import ReferencePipeline
from mc_runtime import Runtime
from mc_runtime.backends.base import Settings
from mc_runtime.backends.registry import create_backend
from mc_runtime.bundle.manifest import Precision
from mc_runtime.bundle.store import open_bundle
from mc_runtime.errors import BundleError, EngineError
from tests.export.conftest import program_of
from tests.export.test_engines import SHAPES, feeds_of
from tests.factories import tiny_metacanvas_checkpoint

pytestmark = pytest.mark.slow

PROMPT = "a red circle left of a blue square"
TOLERANCE = {Precision.FP32: 2e-5, Precision.BF16: 3e-2}
LOAD_AND_DRAW = """
import sys
started = []
sys.addaudithook(lambda event, arguments: started.append((event, arguments)) if event in
                 ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec") else None)
from mc_runtime import Runtime
result = Runtime.load(sys.argv[1], threads=1).generate(sys.argv[2], seed=5, steps=2)
assert not started, started
assert "torch._inductor" not in sys.modules and "diffusers" not in sys.modules
print(result.latents.astype("float32").tobytes().hex())
"""


class Built(NamedTuple):
    """A checkpoint, its bundle, and what the build wrote elsewhere."""

    checkpoint: Path
    bundle: Path
    report: BuildReport
    left_over: list[str]


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """MetaCanvas: planner and step in float32, decoder in bf16; temporary files go where they can be seen."""
    folder = tmp_path_factory.mktemp("inductor")
    checkpoint = tiny_metacanvas_checkpoint(folder / "checkpoint", seed=11, layers=1)
    temporary = folder / "temporary"
    temporary.mkdir()
    options = BuildOptions(target="inductor", engines={"vae_decoder": EngineChoice("inductor", Precision.BF16)}, max_batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        report = build_bundle(checkpoint, folder / "bundle", options)
    return Built(checkpoint, folder / "bundle", report, files_below(temporary))


def loaded(bundle: Path, component: str, **changes: Any) -> tuple[Any, Any]:
    """A backend and one of the bundle's engines, its manifest entry changed."""
    spec = replace(open_bundle(bundle).manifest.engines[component], **changes)
    backend = create_backend("inductor", Settings(threads=1))
    return backend, backend.load(component, tuple(bundle / name for name in spec.files), spec)


def test_the_build_measured_every_engine(built: Built) -> None:
    engines = open_bundle(built.bundle).manifest.engines
    assert {name: str(engine.precision) for name, engine in engines.items()} == {
        "planner": "fp32", "step": "fp32", "vae_decoder": "bf16",
    }  # fmt: skip
    for engine in engines.values():
        assert engine.error is not None
        assert engine.error.relative_l2 <= TOLERANCE[engine.precision]
        assert len({shape["B"] for shape in engine.error.shapes}) == 3
        assert engine.options["torch"] == torch.__version__.partition("+")[0]


def test_the_build_writes_nowhere_else(built: Built) -> None:
    assert built.left_over == []
    assert file_names(built.bundle / "engines") == sorted(
        f"{name}.{suffix}" for name in ("planner", "step", "vae_decoder") for suffix in ("pt2", "safetensors")
    )


def test_engines_equal_their_modules_at_odd_sizes(built: Built) -> None:
    """Again, at sizes of the tests' own: one row of text, one picture, three pictures."""
    for component in ("planner", "step", "vae_decoder"):
        program = program_of(built.checkpoint, component)
        spec = open_bundle(built.bundle).manifest.engines[component]
        verify_engine(
            program, spec, [built.bundle / name for name in spec.files], feeds_of(program, SHAPES),
            tolerance=TOLERANCE[spec.precision],
        )  # fmt: skip


def test_a_picture_equals_the_reference(built: Built) -> None:
    """The same latents to the rounding of float32, with another seed, two pictures, odd sizes; the decoder's bf16 shows."""
    runtime = Runtime.load(built.bundle, threads=1)
    reference = ReferencePipeline(load_checkpoint(built.checkpoint))
    for size in ((32, 32), (24, 40)):
        arguments: dict[str, Any] = {"seed": 9, "steps": 3, "size": size}
        result = runtime.generate(PROMPT, num_images=2, **arguments)
        expected = reference.generate(PROMPT, **arguments)
        np.testing.assert_allclose(result.latents[:1], expected.latents, atol=2e-5)
        difference = np.asarray(result.images[0]).astype(int) - np.asarray(expected.images[0])
        assert 0 < np.abs(difference).max() <= 4  # of 255


def test_loading_compiles_nothing(built: Built, tmp_path: Path) -> None:
    """No compiler on the path, no process started, none of torch's compiler imported; and the picture is the same."""
    environment = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "CXX": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_DRAW, str(built.bundle), PROMPT], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    here = Runtime.load(built.bundle, threads=1).generate(PROMPT, seed=5, steps=2)
    assert bytes.fromhex(done.stdout.strip()) == here.latents.astype("float32").tobytes()


def test_a_package_describes_itself(built: Built) -> None:
    spec = open_bundle(built.bundle).manifest.engines["step"]
    _, engine = loaded(built.bundle, "step")
    assert engine.describe() == (spec.inputs, spec.outputs)


def test_bound_calls_write_in_place_and_check_first(built: Built) -> None:
    backend, engine = loaded(built.bundle, "vae_decoder")
    spec = open_bundle(built.bundle).manifest.engines["vae_decoder"]
    latents = np.random.default_rng(0).standard_normal((2, 4, 3, 5)).astype(np.float32)
    given, pixels = backend.to_device(latents), backend.empty((2, 12, 20, 3))
    call = engine.bind({"latents": given}, {"pixels": pixels})
    call.run()
    first = backend.to_host(pixels).copy()
    np.testing.assert_array_equal(first, backend.to_host(engine.run({"latents": given})["pixels"]))
    backend.write(given, -latents)
    call.run()
    assert np.abs(backend.to_host(pixels) - first).max() > 1e-3
    assert spec.options["sizes"]["B"] == [1, 4, 1]
    for shape in ((4, 3, 5), (2, 4, 1, 5), (5, 4, 3, 5), (2, 3, 3, 5)):
        with pytest.raises(EngineError, match="vae_decoder engine"):
            engine.bind({"latents": backend.empty(shape)}, {"pixels": pixels})
    with pytest.raises(EngineError, match=r"asked for \['picture'\]"):
        engine.bind({"latents": given}, {"picture": pixels})
    with pytest.raises(EngineError, match="does not fit its outputs"):
        engine.bind({"latents": given}, {"pixels": backend.empty((2, 12, 21, 3))}).run()


@pytest.mark.parametrize(("change", "message"), [
    ({"torch": "2.9.1"}, "compiled with torch 2.9.1"), ({"features": ["avx2", "avx1024"]}, "a CPU with avx1024, which"),
    ({"sizes": None}, "not those of a compiled package"),
])  # fmt: skip
def test_a_package_for_elsewhere_is_refused_before_it_is_opened(built: Built, change: dict[str, Any], message: str) -> None:
    spec = open_bundle(built.bundle).manifest.engines["step"]
    backend = create_backend("inductor", Settings())
    changed = replace(spec, options={**spec.options, **change})
    with pytest.raises(BundleError, match=message) as caught:
        backend.load("step", (Path("nowhere.pt2"),), changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["no zip", "cut", "no weights", "other weights"])
def test_damaged_packages_are_engine_errors(built: Built, damage: str, tmp_path: Path) -> None:
    spec = open_bundle(built.bundle).manifest.engines["vae_decoder"]
    package, weights = (shutil.copy(built.bundle / name, tmp_path) for name in spec.files)
    if damage == "no zip":
        Path(package).write_bytes(b"not a zip")
    elif damage == "cut":
        Path(package).write_bytes(Path(package).read_bytes()[:-2000])
    elif damage == "no weights":
        Path(weights).write_bytes(b"\x08")
    else:
        shutil.copy(built.bundle / "engines" / "step.safetensors", weights)
    backend = create_backend("inductor", Settings())
    with pytest.raises(EngineError, match=r"vae_decoder engine .* does not load") as caught:
        backend.load("vae_decoder", (Path(package), Path(weights)), spec)
    assert "\n" not in str(caught.value)


def test_an_altered_library_is_never_opened(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Path(shutil.copytree(built.bundle, tmp_path / "bundle"))
    library = bundle / "engines" / "step.pt2"
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", None)
    with pytest.raises(BundleError, match=r"step\.pt2: altered"):
        Runtime.load(bundle)
