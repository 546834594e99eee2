"""Prompts to token ids and positions, with `tokenizers` and numpy alone."""

from mc_runtime.prompting.positions import Grid, canvas_positions, sequence_positions, text_positions
from mc_runtime.prompting.template import framed, normalized
from mc_runtime.prompting.tokenizer import MAX_CHARACTERS, Encoded, Prompter

__all__ = [
    "MAX_CHARACTERS",
    "Encoded",
    "Grid",
    "Prompter",
    "canvas_positions",
    "framed",
    "normalized",
    "sequence_positions",
    "text_positions",
]
