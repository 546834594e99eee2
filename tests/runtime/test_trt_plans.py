"""What the manifest says of a TensorRT plan, held against versions, GPUs and shapes; what the library's diagnosis means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mc_runtime.backends.gpu import Gpu
from mc_runtime.backends.trt_plans import TrtPlan, choose_profile, extents_of, profile_shapes, why_invalid
from mc_runtime.bundle.manifest import Engine, Precision, Tensor
from mc_runtime.errors import BundleError, EngineError

WHERE = Path("engines/step.engine")
ADA = Gpu("NVIDIA L4", (8, 9), 20 * 2**30)
SMALL, LARGE = {"B": [1, 1, 4], "H": [16, 32, 64]}, {"B": [1, 2, 4], "H": [64, 128, 256]}
OPTIONS: dict[str, Any] = {
    "version": "1.7.1.116", "capabilities": ["8.9", "12.0"], "profiles": [SMALL, LARGE], "gpu_bytes": 2**30,
}  # fmt: skip


def spec_of(**options: Any) -> Engine:
    return Engine(
        target="tensorrt-rtx",
        precision=Precision.BF16,
        files=("engines/step.engine",),
        inputs=(
            Tensor(name="sample", dtype="float32", shape=("B", 3, "H")),
            Tensor(name="pixels", dtype="float32", shape=("B", "8*H", 3)),
        ),
        outputs=(Tensor(name="next", dtype="float32", shape=("B", 3, "H")),),
        options={**OPTIONS, **options},
    )


def plan_of(**options: Any) -> TrtPlan:
    return TrtPlan.of("step", spec_of(**options))


def shapes(batch: int, height: int) -> dict[str, tuple[int, ...]]:
    return {"sample": (batch, 3, height), "pixels": (batch, 8 * height, 3)}


def test_options_become_a_plan() -> None:
    plan = plan_of(kept_fp32=[])  # what a quantizer notes is not the plan's business
    assert (plan.version, plan.capabilities, plan.gpu_bytes) == ("1.7.1.116", ("8.9", "12.0"), 2**30)
    assert plan.profiles[1] == {"B": (1, 2, 4), "H": (64, 128, 256)}


@pytest.mark.parametrize("options", [
    {"profiles": []}, {"profiles": [{"B": [1, 2]}]}, {"profiles": [{"B": [2, 1, 4]}]}, {"profiles": 3}, {"gpu_bytes": "much"},
    {"capabilities": 8.9}, {"profiles": [{"B": [1, 5, 4]}]},
])  # fmt: skip
def test_options_of_something_else_are_a_bundle_error(options: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"step engine: options .* are not those of a TensorRT plan") as caught:
        plan_of(**options)
    assert "\n" not in str(caught.value)


def test_another_version_is_refused() -> None:
    plan = plan_of()
    plan.check_version(WHERE, "tensorrt-rtx", "1.7.1.116")
    with pytest.raises(EngineError, match=r"by tensorrt-rtx 1\.7\.1\.116, and 1\.8\.0\.1 is .* pip install tensorrt-rtx==1\.7"):
        plan.check_version(WHERE, "tensorrt-rtx", "1.8.0.1")


def test_a_gpu_it_was_built_for() -> None:
    plan_of().check_gpu(WHERE, "tensorrt-rtx", ADA)


@pytest.mark.parametrize(("gpu", "target", "message"), [
    (None, "tensorrt-rtx", "runs on an NVIDIA GPU, and there is none here; use a machine with one"),
    (Gpu("NVIDIA H100", (9, 0), 2**40), "tensorrt-rtx",
     r"for compute capability 8\.9, 12\.0, and NVIDIA H100 has 9\.0; .* --compute-capability 9\.0"),
    (Gpu("NVIDIA H100", (9, 0), 2**40), "tensorrt", "build the bundle again on this machine"),
    (Gpu("NVIDIA L4", (8, 9), 2**29), "tensorrt-rtx", r"need 1\.00 GiB of GPU memory and 0\.50 GiB are free on NVIDIA L4; end"),
])  # fmt: skip
def test_a_gpu_that_does_not_fit(gpu: Gpu | None, target: str, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        plan_of().check_gpu(WHERE, target, gpu)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("batch", "height", "profile"), [
    (1, 16, 0), (4, 32, 0), (1, 64, 0), (4, 64, 1), (1, 128, 1), (2, 256, 1),
])  # fmt: skip
def test_the_profile_that_is_tuned_for_the_nearest_shapes(batch: int, height: int, profile: int) -> None:
    assert choose_profile("step", spec_of(), plan_of(), shapes(batch, height)) == profile


@pytest.mark.parametrize(("given", "message"), [
    (shapes(5, 32), r"no profile takes B=5, H=32; it was built for B 1 to 4, H 16 to 64 or B 1 to 4, H 64 to 256"),
    (shapes(1, 257), "no profile takes B=1, H=257"),
    ({"sample": (1, 3, 32)}, r"takes \['pixels', 'sample'\] and was given \['sample'\]"),
    ({**shapes(1, 32), "sample": (1, 4, 32)}, r"sample: \[1, 4, 32\] does not fit"),
    ({**shapes(1, 32), "pixels": (1, 257, 3)}, r"pixels: \[1, 257, 3\] does not fit"),
    ({**shapes(1, 32), "pixels": (2, 256, 3)}, r"pixels is \[2, 256, 3\] where .* is taken with B=1, H=32"),
])  # fmt: skip
def test_shapes_that_no_profile_takes(given: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(EngineError, match=f"step engine: {message}"):
        choose_profile("step", spec_of(), plan_of(), given)


def test_a_profile_in_the_shapes_of_inputs() -> None:
    found = profile_shapes(spec_of().inputs, plan_of().profiles[1])
    assert found == {
        "sample": ((1, 3, 64), (2, 3, 128), (4, 3, 256)),
        "pixels": ((1, 512, 3), (2, 1024, 3), (4, 2048, 3)),
    }
    assert extents_of("step", spec_of(), shapes(3, 17)) == {"B": 3, "H": 17}


def test_what_the_library_says_of_a_plan() -> None:
    bits = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4, "SOMETHING_NEW": 128}
    assert why_invalid(1, bits).startswith("another version")
    assert why_invalid(6, bits) == (
        "it was not built for this GPU: build the bundle again with --compute-capability; the NVIDIA driver is too old for it: "
        "update the driver"
    )
    assert "no reason" in why_invalid(0, bits)
    assert "no reason" in why_invalid(128, bits)


def test_listing_targets_imports_neither_library() -> None:
    code = (
        "import sys; from mc_runtime.backends.registry import available; import mc_runtime.cli.options; found = available();"
        "assert {'tensorrt', 'tensorrt-rtx'} <= set(found);"
        "print([name for name in sys.modules if name.startswith(('tensorrt', 'cuda', 'torch'))])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
