"""Pixels to pictures and files, and the canvas as a picture."""

from mc_runtime.media.canvas_map import canvas_map
from mc_runtime.media.images import FORMATS, pixels_to_images, read_metadata, save_image
from mc_runtime.media.sheet import contact_sheet

__all__ = ["FORMATS", "canvas_map", "contact_sheet", "pixels_to_images", "read_metadata", "save_image"]
