"""Prompts, pictures and clips to token ids, positions and pixels, with `tokenizers`, Pillow and numpy alone."""

from mc_runtime.prompting.pixels import Media, Picture
from mc_runtime.prompting.positions import Grid, canvas_positions, sequence_positions
from mc_runtime.prompting.template import framed, normalized
from mc_runtime.prompting.tokenizer import MAX_CHARACTERS, Encoded, Prompter
from mc_runtime.prompting.vision import Seen, look_at, tower_inputs

__all__ = [
    "MAX_CHARACTERS",
    "Encoded",
    "Grid",
    "Media",
    "Picture",
    "Prompter",
    "Seen",
    "canvas_positions",
    "framed",
    "look_at",
    "normalized",
    "sequence_positions",
    "tower_inputs",
]
