"""One file an autoencoder class: its strides, how its latents are scaled, and the engines it gives."""
