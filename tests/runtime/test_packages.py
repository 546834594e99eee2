"""What the manifest says of a compiled package, held against this machine and against every run's shapes; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mc_runtime.backends.packages import (
    Package,
    RunMemory,
    base_version,
    check_shapes,
    described_signature,
    signature_described,
)
from mc_runtime.bundle.manifest import Engine, Precision, Tensor
from mc_runtime.errors import BundleError, EngineError

OPTIONS: dict[str, Any] = {"torch": "2.13.0", "features": ["avx2", "fma"], "sizes": {"B": [1, 4, 1], "H": [16, 64, 8]}}
WHERE = Path("engines/step.pt2")


def spec_of(**options: Any) -> Engine:
    return Engine(
        target="inductor",
        precision=Precision.FP32,
        files=("engines/step.pt2", "engines/step.safetensors"),
        inputs=(
            Tensor(name="sample", dtype="float32", shape=("B", 3, "H")),
            Tensor(name="select", dtype="int64", shape=("B",)),
        ),
        outputs=(Tensor(name="next", dtype="float32", shape=("B", 3, "H")),),
        options={**OPTIONS, **options},
    )


def package_of(**options: Any) -> Package:
    return Package.of("step", spec_of(**options))


def test_options_become_a_package() -> None:
    run = {"bytes": 456, "at": {"B": 1}, "powers": {"B": 1.0}}
    package = package_of(capability=[9, 0], gpu_bytes=123, run_memory=run)
    assert package.torch == "2.13.0"
    assert package.features == ("avx2", "fma")
    assert package.sizes == {"B": (1, 4, 1), "H": (16, 64, 8)}
    assert package.capability == (9, 0)
    assert package.gpu_bytes == 123
    assert package.run == RunMemory(456, {"B": 1}, {"B": 1.0})
    assert package_of().run is None


@pytest.mark.parametrize("options", [
    {"sizes": {"B": [1, 4]}}, {"sizes": [1]}, {"sizes": {"B": ["one", 2, 3]}}, {"capability": [9]}, {"features": 5},
    {"threads": 2}, {"gpu_bytes": "much"}, {"run_memory": {"bytes": 1}},
    {"run_memory": {"bytes": 1, "at": {"B": 0}, "powers": {"B": 1}}},
])  # fmt: skip
def test_options_of_something_else_are_a_bundle_error(options: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"step engine: options .* are not those of a compiled package") as caught:
        package_of(**options)
    assert "\n" not in str(caught.value)


def test_another_torch_is_refused_and_a_local_version_is_not() -> None:
    package = package_of()
    for version in ("2.13.0", "2.13.0+cpu", "2.13.0+cu130"):
        package.check_torch(WHERE, version)
    with pytest.raises(BundleError, match=r"with torch 2\.13\.0, here is 2\.12\.1; pip install torch==2\.13\.0, or build"):
        package.check_torch(WHERE, "2.12.1")
    assert base_version("2.13.0+cpu") == "2.13.0"


def test_another_cpu_is_refused() -> None:
    package = package_of(features=["avx2", "avx512bw", "avx512_bf16"])
    package.check_cpu(WHERE, ["avx2", "fma", "avx512bw", "avx512_bf16"])
    with pytest.raises(BundleError, match=r"a CPU with avx512bw, avx512_bf16, which this one lacks; .*--target onnxruntime"):
        package.check_cpu(WHERE, ["avx2", "fma"])


def given(**changes: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {"sample": ((2, 3, 24), "float32"), "select": ((2,), "int64"), **changes}


def test_shapes_that_fit() -> None:
    check_shapes("step", spec_of(), package_of(), given())
    check_shapes("step", spec_of(), package_of(), {"sample": ((4, 3, 64), "float32"), "select": ((4,), "int64")})


@pytest.mark.parametrize(("changes", "message"), [
    ({"sample": ((2, 3), "float32")}, r"sample is float32 \[2, 3\] where float32 \['B', 3, 'H'\] is taken"),
    ({"sample": ((2, 4, 24), "float32")}, r"sample is float32 \[2, 4, 24\]"),
    ({"sample": ((2, 3, 24), "float64")}, "sample is float64"),
    ({"select": ((3,), "int64")}, r"select is int64 \[3\] .* with B=2, H=24"),
    ({"select": ((2,), "int32")}, "select is int32"),
    ({"sample": ((2, 3, 72), "float32")}, "H is 72, and it was compiled for 16 to 64 in steps of 8"),
    ({"sample": ((2, 3, 20), "float32")}, "H is 20"),
    ({"sample": ((9, 3, 24), "float32"), "select": ((9,), "int64")}, "B is 9, and it was compiled for 1 to 4$"),
    ({"more": ((1,), "float32")}, "was given .*more"),
])  # fmt: skip
def test_shapes_that_compiled_code_would_read_past(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=f"step engine: .*{message}"):
        check_shapes("step", spec_of(), package_of(), given(**changes))


def test_a_signature_comes_back_as_it_was() -> None:
    spec = spec_of()
    assert signature_described(described_signature(spec.inputs, spec.outputs)) == (spec.inputs, spec.outputs)
    for text in ("", "[]", "[1, 2]", '[[["a", "float32", 3]], []]'):
        with pytest.raises((ValueError, TypeError)):
            signature_described(text)
