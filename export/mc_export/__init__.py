"""Build half of mc-runtime: a MetaCanvas or diffusers checkpoint in, a bundle of engines out."""

import mc_runtime.backends  # noqa: F401  # what it switches off is off before any library of this half is imported
