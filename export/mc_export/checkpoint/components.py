"""Loads single components with diffusers' and transformers' own loaders, and says which tensor is wrong if one is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from mc_runtime.errors import CheckpointError

_LIBRARIES = {"diffusers", "transformers"}
_INDEX_SUFFIX = ".safetensors.index.json"


def load_component(root: Path, component: str, index: dict[str, tuple[str, str]], dtype: torch.dtype) -> nn.Module:
    """Loads one model of a pipeline folder, every weight of it, in evaluation mode.

    Raises:
        CheckpointError: the class is of another library, weights are unreadable, or a tensor is missing or misshapen.
    """
    library, class_name = index[component]
    if library not in _LIBRARIES:
        raise CheckpointError(f"{root}: {component} is a class of {library!r}; only diffusers and transformers are loaded")
    folder = root / component
    check_weights(folder)
    model_class: Any = getattr(importlib.import_module(library), class_name, None)
    is_model = isinstance(model_class, type) and issubclass(model_class, nn.Module)
    if not is_model:
        raise CheckpointError(f"{root}: the installed {library} has no model {class_name}; upgrade it")
    arguments: dict[str, Any] = {"torch_dtype": dtype}
    if (
        library == "transformers"
    ):  # told to go on, it lists the tensors that do not fit; otherwise it only says that some do not
        arguments = {"dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        with _quiet_libraries():
            model, info = model_class.from_pretrained(
                str(folder), use_safetensors=True, output_loading_info=True, local_files_only=True, **arguments
            )
    except Exception as error:  # a configuration can be wrong in as many ways as there are types
        raise CheckpointError(f"{folder}: {_said(error)}") from error
    missing, mismatched = sorted(info.get("missing_keys") or ()), sorted(info.get("mismatched_keys") or ())
    if missing:
        raise CheckpointError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if mismatched:
        name, found, wanted = mismatched[0]
        raise CheckpointError(f"{folder}: tensor {name!r} is {tuple(found)}, must be {tuple(wanted)} by config.json")
    loaded: nn.Module = model
    _check_finite(loaded.state_dict(), folder)
    return loaded.requires_grad_(False).eval()


def _check_finite(tensors: Mapping[str, torch.Tensor], where: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            ends = torch.stack(torch.aminmax(tensor))  # NaN is passed on; a mask of the whole tensor would take memory
            if not bool(torch.isfinite(ends).all()):
                raise CheckpointError(f"{where}: tensor {name!r} holds NaN or infinite numbers; fetch it again")


def _said(error: Exception) -> str:
    """What an error of the libraries says, with its type, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No progress bars and load reports of the libraries: what matters of them becomes a CheckpointError."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(library: str, class_name: str, folder: Path) -> Any:
    """Loads a scheduler, tokenizer or processor from its folder.

    Raises:
        CheckpointError: the class is unknown, or the folder is not what it loads.
    """
    loader = getattr(importlib.import_module(library), class_name, None)
    if not (isinstance(loader, type) and hasattr(loader, "from_pretrained")):
        raise CheckpointError(f"{folder}: the installed {library} has no {class_name}; upgrade it")
    # transformers asks at the terminal whether a tokenizer's own code may run, unless it is told.
    arguments = {"trust_remote_code": False} if library == "transformers" else {}
    try:
        return loader.from_pretrained(str(folder), local_files_only=True, **arguments)
    except Exception as error:  # as in load_component
        raise CheckpointError(f"{folder}: {_said(error)}") from error


def check_weights(folder: Path) -> None:
    """The folder has safetensors files and each opens; a truncated one is found by its header.

    Raises:
        CheckpointError: names the file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no safetensors weights; convert them (nothing is unpickled)")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged ({error}); fetch it again") from error


def load_canvas_weights(canvas: nn.Module, file: Path) -> None:
    """Fills ``canvas`` from ``canvas.safetensors``; errors as in :func:`read_canvas_weights`."""
    canvas.load_state_dict(read_canvas_weights(canvas, file))


def read_canvas_weights(canvas: nn.Module, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of ``canvas.safetensors``, each of the shape that ``canvas`` has for it (it may be on the meta device).

    Raises:
        CheckpointError: unreadable, or a tensor is missing, unexpected or misshapen; the message names it.
    """
    try:
        weights: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); fetch it again") from error
    expected = canvas.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise CheckpointError(f"{file}: tensor {name!r} is missing")
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"{file}: tensor {name!r} is {tuple(weights[name].shape)}, must be {tuple(tensor.shape)} by metacanvas.json"
            )
    if unexpected := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(f"{file}: unexpected tensor {unexpected[0]!r}; does metacanvas.json belong to it?")
    _check_finite(weights, file)
    return weights


def save_canvas_weights(canvas: nn.Module, file: Path) -> None:
    """Writes ``canvas.safetensors``."""
    save_file({name: tensor.contiguous() for name, tensor in canvas.state_dict().items()}, file)
