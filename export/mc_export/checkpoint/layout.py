"""Names of the files and folders of a checkpoint."""

from __future__ import annotations

MODEL_INDEX = "model_index.json"
CANVAS_WEIGHTS = "canvas.safetensors"
PLANNER = "planner"
PROCESSOR = "processor"
PLANNER_LORA = "planner_lora"
VAE = "vae"
SCHEDULER = "scheduler"
FEATURE_EXTRACTOR = "feature_extractor"
IMAGE_SETTINGS = "preprocessor_config.json"

# What is fetched from a hub: weights as safetensors, configurations and tokenizers. Never code, never pickles.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
