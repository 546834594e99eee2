"""Autoencoders through onnxruntime and OpenVINO: every engine at other shapes, and whole clips against diffusers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mc_export.autoencoders.feeds import autoencoder_feeds
from mc_export.autoencoders.registry import AUTOENCODERS, vae_program
from mc_export.build.verify import verify_engine
from mc_export.lower import lower
from mc_export.lower.onnx import OnnxFile, onnx_from_program
from mc_export.program.base import Program
from mc_export.program.export import export_program
from mc_runtime.backends.base import Settings
from mc_runtime.backends.registry import create_backend
from mc_runtime.bundle.manifest import Engine, Precision
from mc_runtime.runtime.clips import Codec, decode_clip, encode_clip
from mc_runtime.runtime.engines import LoadedEngine
from mc_runtime.runtime.work import Work
from tests.factories import tiny_autoencoder_kl, tiny_temporal_decoder, tiny_wan_autoencoder

KINDS = {
    "kl": lambda: tiny_autoencoder_kl(1, shift_factor=0.1),
    "temporal": lambda: tiny_temporal_decoder(1),
    "wan 2.1": lambda: tiny_wan_autoencoder("2.1", 1),
    "wan 2.2": lambda: tiny_wan_autoencoder("2.2", 1),
}
# Wan 2.1's engines are those of 2.2 without patches and shortcuts: as torch modules both are tested, as engines the latter.
ENGINES = ("kl", "temporal", "wan 2.2")
TARGETS = [("onnxruntime", Precision.FP32, 2e-5), ("openvino", Precision.FP32, 2e-5), ("openvino", Precision.BF16, 4e-2)]
_exported: dict[str, dict[str, tuple[Program, OnnxFile]]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("autoencoders")


def exported(kind: str, folder: Path) -> dict[str, tuple[Program, OnnxFile]]:
    """The kind's programs and their graphs, made once."""
    if kind not in _exported:
        vae = KINDS[kind]()
        made = {}
        for component in AUTOENCODERS[type(vae).__name__].components:
            program = vae_program(component, vae)
            path = folder / f"{kind}-{component}.onnx"
            made[component] = program, onnx_from_program(export_program(program), program.inputs, program.outputs, path)
        _exported[kind] = made
    return _exported[kind]


def engine_of(program: Program, graph: OnnxFile, target: str, precision: Precision, where: Path) -> tuple[Engine, list[Path]]:
    where.mkdir()
    files, options = lower(target, graph, program.component, precision, [], where)
    names = tuple(file.name for file in files)
    spec = Engine(
        target=target, precision=precision, files=names, inputs=program.inputs, outputs=program.outputs, options=options
    )
    return spec, files


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision", "tolerance"), TARGETS)
@pytest.mark.parametrize("kind", ENGINES)
def test_engines_equal_their_modules(
    kind: str, target: str, precision: Precision, tolerance: float, folder: Path, tmp_path: Path
) -> None:
    for component, (program, graph) in exported(kind, folder).items():
        spec, files = engine_of(program, graph, target, precision, tmp_path / component)
        feeds = [program.example(extents, seed=3) for extents in program.check_extents()]
        error = verify_engine(program, spec, files, feeds, tolerance=tolerance)
        assert error.relative_l2 > 0


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_clip_through_engines_equals_diffusers(target: str, folder: Path, tmp_path: Path) -> None:
    kind = "wan 2.2"
    backend = create_backend(target, Settings())
    loaded = {}
    for component, (program, graph) in exported(kind, folder).items():
        spec, files = engine_of(program, graph, target, Precision.FP32, tmp_path / component)
        loaded[component] = LoadedEngine(spec, backend, backend.load(component, tuple(files), spec))
    vae, work = KINDS[kind](), Work()
    scaling = AUTOENCODERS["AutoencoderKLWan"].scaling(vae.config)
    latents = torch.randn(2, 4, 4, 3, 5, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        image = vae.decode(scaling.values(latents)).sample
        expected = (image / 2 + 0.5).clamp(0, 1).movedim(1, -1)
        encoded = scaling.latents(vae.encode(expected.movedim(-1, 1) * 2 - 1).latent_dist.mode())
    decoder = Codec(loaded["vae_decoder"], loaded["vae_decoder_next"])
    pixels = np.concatenate(list(decode_clip(decoder, latents.numpy(), work.clock, work)), axis=1)
    assert pixels.shape[:2] == (2, 13)
    assert np.abs(pixels - expected.numpy()).max() < 2e-5
    encoder = Codec(loaded["vae_encoder"], loaded["vae_encoder_next"])
    found = encode_clip(encoder, np.moveaxis(expected.numpy(), 1, 0), work.clock, work)
    assert np.abs(found - encoded.numpy()).max() < 2e-5 * max(1.0, float(encoded.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_feeds_of_a_request_fit_every_engine(kind: str) -> None:
    vae = KINDS[kind]()
    feeds = autoencoder_feeds(vae, torch.randn(1, 4, 3, 2, 3))
    assert set(feeds) == set(AUTOENCODERS[type(vae).__name__].components)
    for component, given in feeds.items():
        program = vae_program(component, vae)
        assert given
        for feed in given:
            program.extents_of(feed)
            assert set(feed) == {tensor.name for tensor in program.inputs}
