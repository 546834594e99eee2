"""Bundles on disk: every way one can be wrong is a BundleError that names the file and the mend."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mc_runtime import Runtime
from mc_runtime.bundle.arrays import load_arrays, save_arrays
from mc_runtime.bundle.manifest import Machine, manifest_from_json, manifest_to_json
from mc_runtime.bundle.store import describe_files, open_bundle
from mc_runtime.errors import BundleError
from tests.runtime.fake_bundle import write_fake_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_fake_bundle(tmp_path / "bundle")


def edit_manifest(bundle: Path, *path: str, value: object) -> None:
    file = bundle / "manifest.json"
    document = json.loads(file.read_text())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(document))


def fault(bundle: Path, **options: object) -> str:
    with pytest.raises(BundleError) as caught:
        Runtime.load(bundle, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert "build" in message
    assert caught.value.exit_code == 3
    return message


def test_manifest_survives_the_round_trip(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    text = manifest_to_json(manifest)
    assert manifest_from_json(text, "again") == manifest
    assert text == (bundle / "manifest.json").read_text()


def test_equal_manifests_give_equal_bytes_and_digests(bundle: Path) -> None:
    opened = open_bundle(bundle)
    (bundle / "manifest.json").write_text(manifest_to_json(replace(opened.manifest)))
    assert open_bundle(bundle).digest == opened.digest


def test_altered_file_is_named(bundle: Path) -> None:
    file = bundle / "step" / "model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    message = fault(bundle)
    assert str(file) in message
    assert "sha256" in message


def test_altered_file_is_not_read_without_verify(bundle: Path) -> None:
    file = bundle / "tokenizer.json"
    file.write_bytes(file.read_bytes().swapcase())
    Runtime.load(bundle, verify=False)
    fault(bundle)


def test_truncated_file_is_named_even_without_verify(bundle: Path) -> None:
    file = bundle / "vae_decoder" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file}: {file.stat().st_size} bytes" in fault(bundle, verify=False)


def test_missing_file_is_named(bundle: Path) -> None:
    (bundle / "sampler.safetensors").unlink()
    assert f"{bundle / 'sampler.safetensors'}: missing" in fault(bundle)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    assert "no such bundle" in fault(tmp_path / "nothing")
    assert "not a bundle" in fault(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("version",), 2, "version 2, this mc-runtime reads version 1"),
        (("format",), "zip", "not an mc-runtime bundle"),
        (("surprise",), 1, "surprise: unknown key"),
        (("engines", "step", "surprise"), 1, "engines.step.surprise: unknown key"),
        (("engines", "step", "precision"), "int3", "engines.step.precision: 'int3' is none of fp32, fp16, bf16, int8"),
        (("engines", "step", "files"), [], "engines.step: files"),
        (("engines", "step", "inputs"), "all", "engines.step.inputs: expected a list"),
        (("engines", "step", "files"), ["other.onnx"], "'other.onnx' is used but not listed"),
        (("latents", "channels"), "4", "latents.channels: expected int"),
        (("latents", "channels"), True, "latents.channels: expected int"),
        (("latents", "scale"), 0, "scale: expected at least 1"),
        (("guidance", "branches"), 4, "branches"),
        (("sizes", "default"), [32], "sizes.default: expected 2 items"),
        (("files", "../../etc/passwd"), {"sha256": "0" * 64, "bytes": 1}, "not a plain path"),
        (("canvas", "grid"), [1, 2, 2.5], "canvas.grid[2]: expected int"),
        (("prompting", "planner", "segments"), [{"text": "a", "slot": "prompt"}], "either text or a slot"),
        (("conditioning",), "text_encoder", "engines: 'text_encoder' is missing"),
        (("canvas",), None, "canvas: the step engine takes one"),
        (("max_batch",), 10**30, "max_batch: expected a number of 64 bits"),
        (("guidance", "default"), 10**400, "guidance.default: expected a number of 64 bits"),
        (("guidance", "default"), -1.0, "default: expected 0 or more"),
        (("guidance", "default"), float("nan"), "NaN is not a number in JSON"),
        (("quality",), {"score": float("inf")}, "Infinity is not a number in JSON"),
        (("sizes", "default"), [0, 0], "multiples of 8 from 16 to 128"),
        (("sizes", "default"), [-32, 32], "multiples of 8 from 16 to 128"),
        (("sizes", "default"), [10**9, 10**9], "multiples of 8 from 16 to 128"),
        (("sizes", "served"), [], "none of the served sizes"),
        (("sizes", "served"), [[32, 32], [63, 64]], "multiples of 8 from 16 to 128"),
        (("sizes", "multiple"), 4, "no multiple of latents.scale"),
        (("steps", "default"), 11, "default: 11 is more than max, 10"),
        (("prompting", "planner", "pad_id"), -1, "pad_id, end_token_id: expected 0 or more"),
        (("prompting", "planner", "select"), [0, 8], "select: expected rows from -8 to 7"),
        (("files", ""), {"sha256": "0" * 64, "bytes": 1}, "not a plain path"),
        (("files", "./manifest.json"), {"sha256": "0" * 64, "bytes": 1}, "not a plain path"),
        (("files", "a\0b"), {"sha256": "0" * 64, "bytes": 1}, "not a plain path"),
        (("files", "\ud800"), {"sha256": "0" * 64, "bytes": 1}, "not a plain path"),
        (("engines", "vae_decoder", "inputs"), [], "engines.vae_decoder.inputs: 'latents' is missing"),
        (
            ("engines", "vae_decoder", "outputs"),
            [{"name": name, "dtype": "float32", "shape": ["B", "h", "w", 3]} for name in ("pixels", "depth")],
            "engines.vae_decoder.outputs: 'depth' is none of pixels",
        ),
        (
            ("engines", "vae_decoder", "inputs"),
            [{"name": "latents", "dtype": "float32", "shape": ["B"]}],
            "'latents' has 1 dimensions, expected 4",
        ),
        (
            ("engines", "vae_decoder", "inputs"),
            [{"name": "latents", "dtype": "float32", "shape": [-1, 4, "H", "W"]}],
            "shape: expected sizes of at least 1, found -1",
        ),
    ],
)
def test_wrong_manifest_names_the_field(bundle: Path, path: tuple[str, ...], value: object, expected: str) -> None:
    edit_manifest(bundle, *path, value=value)
    message = fault(bundle)
    assert expected in message
    assert "manifest.json" in message


def test_missing_field_is_named(bundle: Path) -> None:
    file = bundle / "manifest.json"
    document = json.loads(file.read_text())
    del document["latents"]["patch"]
    file.write_text(json.dumps(document))
    assert "latents.patch: missing" in fault(bundle)


def test_number_too_large_for_a_float(bundle: Path) -> None:
    file = bundle / "manifest.json"
    file.write_text(file.read_text().replace('"default": 2.5', '"default": 1e999'))
    assert "guidance.default: expected a finite number" in fault(bundle)


def test_manifest_that_would_fill_the_memory_is_not_read(bundle: Path) -> None:
    with (bundle / "manifest.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert "too large" in fault(bundle)


def test_pipe_in_place_of_a_file_is_not_read(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    os.mkfifo(bundle / "tokenizer.json")
    edit_manifest(bundle, "files", "tokenizer.json", "bytes", value=0)
    assert "tokenizer.json: not a file" in fault(bundle)
    (bundle / "manifest.json").unlink()
    os.mkfifo(bundle / "manifest.json")
    assert "not a file" in fault(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"manifest"', "\x00", "[" * 100_000])
def test_manifest_that_is_no_json_object(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    assert "manifest.json" in fault(bundle)


@pytest.mark.parametrize(
    "machine",
    [
        Machine(arch="riscv64", os=sys.platform),
        Machine(arch="x86_64", os="plan9"),
        Machine(arch="riscv64", os="plan9", features=("amx_int8",)),
    ],
)
def test_bundle_for_another_machine(tmp_path: Path, machine: Machine) -> None:
    message = fault(write_fake_bundle(tmp_path / "bundle", machine=machine))
    assert f"built for {machine.arch} {machine.os}" in message


def test_bundle_that_needs_a_feature_this_cpu_lacks(bundle: Path) -> None:
    edit_manifest(bundle, "machine", "features", value=["fancy|fancier"])
    assert "fancy|fancier" in fault(bundle)


def test_unknown_target(bundle: Path) -> None:
    edit_manifest(bundle, "engines", "step", "target", value="abacus")
    with pytest.raises(BundleError, match="'abacus' is unknown"):
        Runtime.load(bundle)


def test_describe_files_leaves_the_manifest_out(bundle: Path) -> None:
    files = describe_files(bundle)
    assert "manifest.json" not in files
    assert files["step/model.onnx"].bytes == (bundle / "step" / "model.onnx").stat().st_size


def test_arrays_round_trip_and_damage(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3).T, "b": np.array([1, 2], np.int64)}
    save_arrays(tmp_path / "x.safetensors", arrays)
    loaded = load_arrays(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    (tmp_path / "x.safetensors").write_bytes(b"not this")
    for name in ("x.safetensors", "missing.safetensors"):
        with pytest.raises(BundleError, match=name):
            load_arrays(tmp_path / name)


def test_a_step_that_takes_another_context_than_is_given_is_refused(bundle: Path) -> None:
    """Rows of another width would be laid side by side on a GPU without a word."""
    manifest = open_bundle(bundle).manifest
    planner = manifest.engines["planner"]
    wider = tuple(replace(t, shape=(*t.shape[:-1], 7)) if t.name == "context" else t for t in planner.outputs)
    with pytest.raises(ValueError, match=r"its 'context' is \d+ wide, 'planner' gives 7"):
        replace(manifest, engines={**manifest.engines, "planner": replace(planner, outputs=wider)})
