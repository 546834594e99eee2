"""Checkpoints: what is opened, what is assembled, and what each broken one is told."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mc_export.build.options import BuildOptions
from mc_export.build.parts import frames_of, sizes_of
from mc_export.checkpoint import load_checkpoint
from mc_export.checkpoint.assemble import assemble_checkpoint
from mc_export.reference import ReferencePipeline
from mc_runtime.errors import CheckpointError
from tests.factories import tiny_metacanvas_checkpoint, tiny_planner, tiny_processors, tiny_stock_sana
from tests.tiny_wan import tiny_metacanvas_wan


@pytest.fixture(scope="module")
def metacanvas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_metacanvas_checkpoint(tmp_path_factory.mktemp("checkpoints") / "metacanvas")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stock_sana(tmp_path_factory.mktemp("checkpoints") / "stock")


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "planner"
    tiny_planner(3).save_pretrained(str(folder))
    for processor in tiny_processors():
        processor.save_pretrained(str(folder))
    return folder


def test_opens_metacanvas_and_stock(metacanvas: Path, stock: Path) -> None:
    opened = load_checkpoint(metacanvas)
    assert (opened.is_stock, opened.conditioning, opened.backbone.name) == (False, "planner", "sana")
    assert (load_checkpoint(stock).is_stock, load_checkpoint(stock).conditioning) == (True, "text_encoder")


def test_the_hash_covers_every_part(metacanvas: Path, tmp_path: Path) -> None:
    before = load_checkpoint(metacanvas).sha256
    copy = shutil.copytree(metacanvas, tmp_path / "copy")
    assert load_checkpoint(copy).sha256 == before
    (copy / "README.md").write_text("not part of what runs")
    assert load_checkpoint(copy).sha256 == before
    weights = load_file(copy / "canvas.safetensors")
    weights["canvas_tokens.tokens"] += 1e-3
    save_file(weights, copy / "canvas.safetensors")
    assert load_checkpoint(copy).sha256 != before


def test_an_assembled_checkpoint_without_weights_draws_what_the_stock_pipeline_draws(
    stock: Path, planner: Path, tmp_path: Path
) -> None:
    """Fresh projections are zero: conditioned by the kept text encoder, latents are the stock pipeline's, bit for bit."""
    assembled = assemble_checkpoint(tmp_path / "out", planner=planner, pipeline=stock, conditioning="text_encoder")
    assert assembled.config is not None
    assert assembled.config.canvas.grid == (1, 8, 8)
    ours = ReferencePipeline(assembled).generate("a red circle", steps=2, output="latents").latents
    theirs = ReferencePipeline.from_checkpoint(stock).generate("a red circle", steps=2, output="latents").latents
    assert np.array_equal(ours, theirs)


def test_assembling_with_the_planners_context_drops_the_text_encoder(stock: Path, planner: Path, tmp_path: Path) -> None:
    assembled = assemble_checkpoint(tmp_path / "out", planner=planner, pipeline=stock)
    assert not (assembled.path / "text_encoder").exists()
    assert ReferencePipeline(assembled).generate("a cat", steps=1).images[0].size == (32, 32)


def test_a_failed_assembly_leaves_nothing(stock: Path, planner: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "canvas.safetensors"
    save_file({"canvas_tokens.tokens": load_file(planner / "model.safetensors")["model.norm.weight"]}, wrong)
    with pytest.raises(CheckpointError, match=r"canvas_tokens\.tokens"):
        assemble_checkpoint(tmp_path / "out", planner=planner, pipeline=stock, canvas=wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["canvas.safetensors"]


def test_a_planner_of_another_kind_is_refused(stock: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a qwen2_5_vl"):
        assemble_checkpoint(tmp_path / "out", planner=stock / "text_encoder", pipeline=stock)


def set_config(path: str, key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / path).read_text())
        config[key] = value
        (folder / path).write_text(json.dumps(config))

    return change


def drop_tensor(path: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / path)
        del weights[name]
        save_file(weights, folder / path, metadata={"format": "pt"})

    return change


def truncate(path: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: len(data) // 2])

    return change


def reshape_tensor(path: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / path)
        weights[name] = weights[name][:-1].clone()
        save_file(weights, folder / path, metadata={"format": "pt"})

    return change


def set_grid(side: int) -> Callable[[Path], None]:
    return set_config("metacanvas.json", "canvas", {"grid": [1, side, side], "pixels_per_token": 8})


def spoil_tensor(path: str, name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        weights = load_file(folder / path)
        weights[name].view(-1)[-1] = value
        save_file(weights, folder / path, metadata={"format": "pt"})

    return change


def link_to_nothing(folder: Path) -> None:
    (folder / "metacanvas.json").unlink()
    (folder / "metacanvas.json").symlink_to("elsewhere.json")


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_config("metacanvas.json", "colour", "red"), "metacanvas.json: colour: Extra inputs"),
        (set_config("metacanvas.json", "canvas", {"grid": [1, 0, 4], "pixels_per_token": 8}), "canvas.grid.1"),
        (set_config("metacanvas.json", "format_version", 2), "metacanvas.json: format_version"),
        (set_config("metacanvas.json", "tasks", []), "metacanvas.json: tasks: .* at least 1"),
        (set_config("metacanvas.json", "prompt", {"max_tokens": 10**6}), "metacanvas.json: prompt.max_tokens: .* 32768"),
        (lambda folder: (folder / "metacanvas.json").write_text("[]"), "metacanvas.json: Input should be"),
        (set_config("vae/config.json", "scaling_factor", float("nan")), "vae/config.json: scaling_factor holds NaN"),
        (set_config("transformer/config.json", "norm_eps", [[float("inf")]]), "transformer/config.json: norm_eps holds NaN"),
        (drop_tensor("canvas.safetensors", "canvas_tokens.tokens"), "canvas_tokens.tokens' is missing"),
        (
            reshape_tensor("canvas.safetensors", "canvas_connector.plan_block.proj_out.bias"),
            r"plan_block.proj_out.bias' is \(63,\)",
        ),
        (drop_tensor(TRANSFORMER, "proj_out.weight"), "tensor 'proj_out.weight' is missing"),
        (reshape_tensor(TRANSFORMER, "proj_out.bias"), "transformer.*proj_out.bias"),
        (drop_tensor("planner/model.safetensors", "model.norm.weight"), "norm.weight' is missing"),
        (reshape_tensor("planner/model.safetensors", "model.norm.weight"), "planner.*norm.weight"),
        (truncate(TRANSFORMER), "transformer.*damaged"),
        (truncate("canvas.safetensors"), "canvas.safetensors: damaged"),
        (lambda folder: (folder / "canvas.safetensors").unlink(), "canvas.safetensors is missing"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae/config.json is missing"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
        (set_config("model_index.json", "transformer", ["diffusers", "PixArtTransformer2DModel"]), "no supported backbone"),
        (set_config("model_index.json", "vae", ["my_code", "AutoencoderDC"]), "vae is a class of 'my_code'"),
        (set_config("model_index.json", "vae", ["diffusers", "utils"]), "no model utils"),
        (lambda folder: (folder / "model_index.json").write_text("[" * 100_000), "not readable as JSON"),
        (lambda folder: (folder / "metacanvas.json").write_text("[" * 100_000), "not readable as JSON"),
        (link_to_nothing, "metacanvas.json: a link to nothing"),
        (set_grid(10**6), "canvas_tokens.tokens' is"),
        (set_grid(10**12), "metacanvas.json: no canvas"),
        (set_config("metacanvas.json", "canvas_connector", {"plan_head_dim": 7}), "canvas"),
        (set_config("transformer/config.json", "num_layers", "two"), "transformer/config.json: not a SanaTransformer2DModel's"),
        (set_config("vae/config.json", "encoder_block_out_channels", "x"), "vae"),
        (spoil_tensor(TRANSFORMER, "proj_out.weight", float("nan")), "transformer: tensor 'proj_out.weight' holds NaN"),
        (spoil_tensor(TRANSFORMER, "proj_out.bias", float("-inf")), "transformer: tensor 'proj_out.bias' holds NaN"),
        (spoil_tensor("canvas.safetensors", "canvas_tokens.tokens", float("nan")), "canvas.safetensors: tensor 'canvas_tokens"),
    ],
)
def test_a_broken_checkpoint_says_what_is_broken(
    metacanvas: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = shutil.copytree(metacanvas, tmp_path / "copy")
    damage(copy)
    with pytest.raises(CheckpointError, match=message) as caught:
        ReferencePipeline.from_checkpoint(copy)
    assert "\n" not in str(caught.value), "one line"


@pytest.mark.parametrize(
    ("named", "message"),
    [(["my_code", "Euler"], "scheduler is a class of 'my_code'"), (["diffusers", "utils"], "has no utils")],
)
def test_a_scheduler_that_is_none_of_diffusers(metacanvas: Path, tmp_path: Path, named: list[str], message: str) -> None:
    copy = shutil.copytree(metacanvas, tmp_path / "copy")
    set_config("model_index.json", "scheduler", named)(copy)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(copy).load_scheduler()


def test_code_of_a_checkpoint_is_not_run(metacanvas: Path, tmp_path: Path) -> None:
    """transformers would ask at the terminal whether it may run, and wait."""
    copy = shutil.copytree(metacanvas, tmp_path / "copy")
    set_config("processor/tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]})(copy)
    set_config("processor/tokenizer_config.json", "tokenizer_class", "EvilTokenizer")(copy)
    (copy / "processor" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with contextlib.suppress(CheckpointError):
        load_checkpoint(copy).load_planner_tokenizer()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "./nowhere"])
def test_a_source_that_is_nothing_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(source)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_config("transformer/config.json", "sample_size", 1), "transformer/config.json: made for 1 x 1 latent cells"),
        (set_config("transformer/config.json", "patch_size", 3), "must be multiples of 3 from 6 on"),
    ],
)
def test_a_native_size_that_no_engine_can_have(
    metacanvas: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = shutil.copytree(metacanvas, tmp_path / "copy")
    damage(copy)
    with pytest.raises(CheckpointError, match=message):
        sizes_of(load_checkpoint(copy), BuildOptions())


def with_defaults(checkpoint: Path, folder: Path, **defaults: object) -> Path:
    copy = shutil.copytree(checkpoint, folder)
    written = json.loads((copy / "metacanvas.json").read_text())
    (copy / "metacanvas.json").write_text(json.dumps(written | {"defaults": defaults}))
    return copy


def test_a_checkpoint_says_what_a_request_gets_that_does_not(metacanvas: Path, tmp_path: Path) -> None:
    kind = load_checkpoint(metacanvas).defaults
    assert (kind.steps, kind.guidance_scale, kind.frames) == (20, 4.5, None)
    own = load_checkpoint(with_defaults(metacanvas, tmp_path / "own", steps=3, guidance_scale=0.0, frames=9)).defaults
    assert (own.steps, own.guidance_scale, own.frames) == (3, 0.0, None)  # a backbone of pictures makes no frames
    film = tiny_metacanvas_wan(tmp_path / "wan")
    assert (load_checkpoint(film).defaults.frames, load_checkpoint(film).defaults.fps) == (121, 24.0)
    opened = load_checkpoint(with_defaults(film, tmp_path / "film", frames=9, fps=8.0))
    assert (opened.defaults.steps, opened.defaults.frames, opened.defaults.fps) == (50, 9, 8.0)
    served = frames_of(opened)
    assert served is not None
    assert (served.default, served.fps) == (9, 8.0)
    with pytest.raises(CheckpointError, match=r"defaults\.steps"):
        load_checkpoint(with_defaults(metacanvas, tmp_path / "wrong", steps=0))
