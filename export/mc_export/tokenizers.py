"""transformers' tokenizers as files that `tokenizers` alone can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mc_runtime.errors import CheckpointError


def save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Writes the fast tokenizer behind a transformers one, free of padding and truncation left by earlier calls.

    Raises:
        CheckpointError: it has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"{type(tokenizer).__name__} has no fast tokenizer; save the checkpoint with one (tokenizer.json)"
        )
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    path.parent.mkdir(parents=True, exist_ok=True)
    copy.save(str(path))


def pad_id(tokenizer: Any) -> int:
    """The padding token, or any other where padding is masked everywhere."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)
