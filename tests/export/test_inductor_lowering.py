"""How programs become AOTInductor packages: what bf16 leaves alone, which compiler there is, what a failure says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from mc_export.build.verify import verify_engine
from mc_export.lower import inductor, lower_program, target_facts
from mc_export.lower.bf16 import compute_in_bf16
from mc_export.program.base import Axis, Program, float_tensor
from mc_runtime.bundle.manifest import Engine, Precision
from mc_runtime.errors import EngineError
from tests.export.conftest import program_of
from tests.export.test_engines import SHAPES, feeds_of
from tests.factories import tiny_stock_sana

pytestmark = pytest.mark.slow

TOLERANCE = 3e-2  # relative L2, of bf16


def test_a_text_encoder_in_bf16(tmp_path: Path) -> None:
    """Weights of half the size, other numbers than float32's, and near them at every size."""
    component = "text_encoder"
    checkpoint = tiny_stock_sana(tmp_path / "stock", seed=12, layers=1)
    program = program_of(checkpoint, component)
    files, options = lower_program("inductor", program, Precision.BF16, tmp_path)
    program = program_of(checkpoint, component)
    spec = Engine(
        target="inductor", precision=Precision.BF16, files=tuple(file.name for file in files), inputs=program.inputs,
        outputs=program.outputs, options=options,
    )  # fmt: skip
    error = verify_engine(program, spec, files, feeds_of(program, SHAPES), tolerance=TOLERANCE)
    assert error.relative_l2 > 1e-4
    parameters = sum(parameter.numel() for parameter in program.parameters())
    assert files[1].stat().st_size < 2.2 * parameters + 20_000


def test_a_step_in_bf16_is_near(tmp_path: Path) -> None:
    """Uncompiled: it takes as long to compile as all of a bundle, and rounds in the same places."""
    checkpoint = tiny_stock_sana(tmp_path / "stock", seed=12)
    program, lowered = program_of(checkpoint, "step"), compute_in_bf16(program_of(checkpoint, "step"))
    for inputs in feeds_of(program, SHAPES):
        for name, expected in program.run(inputs).items():
            error = (lowered.run(inputs)[name] - expected).norm() / expected.norm()
            assert 1e-4 < error < 2e-2  # measured .002 to .011


def test_bf16_leaves_frequencies_and_the_samplers_arithmetic_alone(tmp_path: Path) -> None:
    program = compute_in_bf16(program_of(tiny_stock_sana(tmp_path / "stock", seed=12), "step"))
    assert {parameter.dtype for parameter in program.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in program.named_buffers() if "frequencies" in name} == {torch.float32}
    inputs = program.example(program.example_extents)
    weights = inputs["coefficients"]
    weights[:, 1:] = 0
    weights[:, 1] = 1  # the next sample is this one: bit for bit, whatever the backbone computes in
    results = program.run(inputs)
    assert torch.equal(results["next_sample"], inputs["sample"])
    assert all(result.dtype == torch.float32 for result in results.values())


class Films(Program):
    """Convolutions over frames of channels-last clips: one skips frames, one has kernels of one cell."""

    component = "vae_encoder"
    inputs = (float_tensor("clips", "B", 5, 4, 3, 8),)
    outputs = (float_tensor("skipped", "B", 8, 2, 4, 3), float_tensor("mixed", "B", 8, 5, 4, 3))
    axes: ClassVar = {"B": Axis("B", 1, 4, 2)}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.skip = torch.nn.Conv3d(8, 8, (3, 1, 1), stride=(2, 1, 1))
        self.mix = torch.nn.Conv3d(8, 8, 1)

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, ...]:
        clips = clips.movedim(-1, 1)
        return self.skip(clips) + clips[:, :, 1:4:2], self.mix(clips) + clips  # the sums see how the results are laid out

    def example(self, extents: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"clips": torch.randn(extents["B"], 5, 4, 3, 8, generator=generator)}


def test_convolutions_over_frames_hold_whatever_computes_them(tmp_path: Path) -> None:
    """The first by batch, the second by number of threads too, torch calls oneDNN or not; their layouts of a result differ."""
    program, before = Films(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        files, options = lower_program("inductor", program, Precision.FP32, tmp_path)
        torch.set_num_threads(1)
        spec = Engine(
            target="inductor", precision=Precision.FP32, files=tuple(file.name for file in files), inputs=program.inputs,
            outputs=program.outputs, options=options,
        )  # fmt: skip
        feeds = [program.example({"B": batch}, seed=batch) for batch in (1, 2, 3)]
        verify_engine(program, spec, files, feeds, tolerance=2e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("asked", [None, "/nowhere/g++"])
def test_no_compiler(asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if asked:
        monkeypatch.setenv("CXX", asked)
    else:
        monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EngineError, match=r"C\+\+ compiler.*apt install g\+\+.*--target onnxruntime") as caught:
        inductor.find_compiler()
    assert "\n" not in str(caught.value)


class Weighs(Program):
    """A table in the code, which is neither a parameter nor a buffer."""

    component = "step"
    inputs = (float_tensor("x", "B", 2),)
    outputs = (float_tensor("y", "B", 2),)
    axes: ClassVar = {"B": Axis("B", 1, 4, 2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([2.0, 3.0])

    def example(self, extents: Any, seed: int = 0) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(extents["B"], 2)}


def test_a_table_in_the_code_keeps_its_name() -> None:
    exported = inductor.exported_in(Weighs(), Precision.FP32)
    module = exported.module()
    assert {name: table.tolist() for name, table in module.named_buffers()} == {"lifted_tensor_0": [2.0, 3.0]}
    assert set(exported.constants) == {"lifted_tensor_0"}
    assert module(x=torch.ones(3, 2)).tolist() == [[2.0, 3.0]] * 3


def test_settings_that_an_older_torch_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inductor._known(inductor.CONSTANTS_BESIDE) == inductor.CONSTANTS_BESIDE
    monkeypatch.setattr(inductor, "_SMALLER", ("aot_inductor.of_another_torch",))
    assert inductor._known({"aot_inductor.of_another_torch": 1, "compile_threads": 1}) == {"compile_threads": 1}


def test_a_compiler_that_fails_is_an_engine_error(tmp_path: Path) -> None:
    class Doubles(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return states.sin() * 2

    broken, folder, asked = tmp_path / "g++", tmp_path / "a folder", tmp_path / "asked"
    folder.mkdir()
    answer = '[ "$1" = --version ] && echo "g++ (Debian) 12.2.0" && exit 0'
    broken.write_text(f'#!/bin/sh\n{answer}\necho "$@" >> {asked}\necho "no space left" >&2; exit 1\n')
    broken.chmod(0o755)
    exported = torch.export.export(Doubles(), (torch.randn(3),))
    with pytest.raises(EngineError, match=r"step: AOTInductor does not .*--target onnxruntime: .*no space") as caught:
        inductor.compiled(exported, "step", {**inductor._SETTINGS, "cpp.cxx": str(broken)}, folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []
    assert str(folder) not in asked.read_text()  # whose space would make two arguments of it


def test_packages_for_a_gpu_are_built_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_export.lower import inductor_cuda

    program = program_of(tiny_stock_sana(tmp_path / "stock", seed=12), "vae_decoder")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match=r"compiles on the GPU it is for, and .*--target inductor or onnxruntime") as caught:
        lower_program("inductor-cuda", program, Precision.BF16, tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(inductor_cuda, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"triton is not installed; pip install 'mc-runtime\[kernels\]', or build with"):
        inductor_cuda.required_gpu()
    monkeypatch.setattr(inductor_cuda, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert inductor_cuda.required_gpu() == (9, 0)
    assert inductor_cuda.required_gpu(Precision.FP8) == (9, 0)
    facts = target_facts("inductor-cuda", Precision.BF16)
    assert facts["capability"] == (9, 0)
    assert {"linear_attention.py", "launch.py"} <= set(facts["kernels"])
    assert target_facts("inductor", Precision.BF16) == target_facts("onnxruntime", Precision.FP32) == {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(
        EngineError, match=r"fp8 needs compute capability 8\.9, the GPU here has 8\.6; build with --precision bf16"
    ):
        target_facts("inductor-cuda", Precision.FP8)
