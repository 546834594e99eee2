"""Files that are no LoRA, or one that lies: one RequestError on one line each, whatever is in them, and never a wait."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.errors import RequestError
from mc_runtime.lora import read_adapter

A, B = "planner.a.lora_A.weight", "planner.a.lora_B.weight"
META = "lora_adapter_metadata"


def ones(*shape: int, value: float = 1.0) -> np.ndarray:
    return np.full(shape, value, np.float32)


def plain() -> dict[str, np.ndarray]:
    return {A: ones(2, 4), B: ones(4, 2)}


def safetensors(tensors: dict[str, np.ndarray], settings: str | None = None) -> bytes:
    """A file as the format says, by hand, so that a header may say anything."""
    header: dict[str, Any] = {} if settings is None else {"__metadata__": {META: settings}}
    body = b""
    for name, array in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    return with_header(header, body)


def with_header(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def lying(**claims: object) -> bytes:
    return with_header({A: {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32], **claims}}, bytes(32))


def refused(path: Path | str) -> str:
    with pytest.raises(RequestError) as caught:
        read_adapter(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


def alpha(value: str) -> bytes:
    return safetensors(plain(), f'{{"planner.lora_alpha": {value}}}')


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (alpha("null"), "lora_alpha is None"),
        (alpha("[1]"), "lora_alpha is"),
        (alpha('"x"'), "lora_alpha is 'x'"),
        (alpha("NaN"), "lora_alpha is nan"),
        (alpha("1e999"), "lora_alpha is inf"),
        (alpha("1" + 400 * "0"), "lora_alpha is 1000"),
        (safetensors(plain(), "[1]"), "no JSON object"),
        (safetensors(plain(), "null"), "no JSON object"),
        (safetensors(plain(), 100_000 * "["), "cannot be read"),
        (safetensors(plain(), '{"planner.init_lora_weights": "pissa_niter_4"}'), "init_lora_weights"),
        (safetensors(plain(), '{"planner.kasa_config": {"beta": 1}}'), "kasa_config"),
        (safetensors({**plain(), "planner.a.alpha": ones(0)}), "0 numbers for its alpha"),
        (safetensors({**plain(), "planner.b.alpha": ones(1)}), "no LoRA of"),
        (safetensors({A: ones(0, 4), B: ones(4, 0)}, '{"planner.lora_alpha": 4}'), "linear layers"),
        (safetensors({A: ones(2, 4), B: ones(4, 2, value=3e38)}, '{"planner.lora_alpha": 40}'), "numbers beyond"),
        (safetensors({A: ones(2, 4, value=2e30), B: ones(4, 2)}), "numbers beyond"),
        (safetensors({**plain(), f"base_model.model.{A[8:]}": ones(1, 4), f"base_model.model.{B[8:]}": ones(4, 1)}), "twice"),
        (safetensors({**plain(), A.replace("weight", "default.weight"): ones(3, 4)}), "twice"),
        (safetensors({"pl\nan\x1b[31mer.lora_C.weight": ones(2, 2)}), "PEFT's LoRA keys"),
        (safetensors({5000 * "x" + ".lora_A.weight": ones(2, 2)}), "lora_A only"),
        (lying(data_offsets=[0, 999_999]), "not a readable safetensors file"),
        (lying(shape=[2**62, 2**62]), "not a readable safetensors file"),
        (
            with_header({A: {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
            "has the shape [0, 4611686018427387904]",
        ),
        (safetensors(plain(), '{"planner.lora_alpha": 2, "planner.use_rslora": "false"}'), "use_rslora is 'false'"),
        (lying(shape=[-2, 4]), "not a readable safetensors file"),
        (lying(dtype="F64", shape=[1, 4]), "is F64; save the LoRA in F32, F16 or BF16"),
        (struct.pack("<Q", 2**63) + b"{}", "not a readable safetensors file"),
        (b"", "empty"),
    ],
)
def test_what_is_no_lora_is_refused_in_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(content)
    message = refused(tmp_path / "adapter.safetensors")
    assert said in message
    assert message.count("not a readable") <= 1


def test_alphas_that_are_right_are_taken(tmp_path: Path) -> None:
    for content in (alpha("4"), safetensors({**plain(), "planner.a.alpha": ones(1, value=4)})):
        (tmp_path / "adapter.safetensors").write_bytes(content)
        _, up = read_adapter(tmp_path / "adapter.safetensors").layers["planner.a"]
        assert np.array_equal(up, ones(4, 2, value=2))


def test_places_that_are_no_file_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refused(tmp_path / "pipe")
    assert "no regular file" in refused("/dev/zero")
    assert "too long" in refused(5000 * "a")
    assert "no such LoRA" in refused("a\0b")
    assert "no such LoRA" in refused("/tmp/a\nb\x1b[31m")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "no such LoRA" in refused(tmp_path / "circle")


@pytest.mark.parametrize("config", ["[]", "null", '{"lora_alpha": "much"}', 200_000 * "[", None])
def test_pefts_folder_with_a_configuration_that_is_none(config: str | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors(plain()))
    if config is None:  # without it alpha would silently be another
        (tmp_path / "adapter_config.json").symlink_to(tmp_path / "gone")
    else:
        (tmp_path / "adapter_config.json").write_text(config)
    refused(tmp_path)
