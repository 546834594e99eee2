"""Build half of mc-runtime: a MetaCanvas or diffusers checkpoint in, a bundle of engines out."""
