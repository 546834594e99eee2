"""Pictures and clips: from files to what engines take, from pixels to files, and the canvas as a picture."""

from mc_runtime.media.canvas_map import canvas_map
from mc_runtime.media.clip import Clip, pixels_to_clips
from mc_runtime.media.clip_input import load_clip
from mc_runtime.media.clip_output import CLIP_FORMATS, save_clip
from mc_runtime.media.comparison import comparison
from mc_runtime.media.fit import fit, fit_clip
from mc_runtime.media.image_input import load_image
from mc_runtime.media.images import FORMATS, pixels_to_images, save_image
from mc_runtime.media.limits import ClipLimits, ImageLimits
from mc_runtime.media.metadata import read_metadata
from mc_runtime.media.sheet import clip_sheet, contact_sheet

__all__ = [
    "CLIP_FORMATS",
    "FORMATS",
    "Clip",
    "ClipLimits",
    "ImageLimits",
    "canvas_map",
    "clip_sheet",
    "comparison",
    "contact_sheet",
    "fit",
    "fit_clip",
    "load_clip",
    "load_image",
    "pixels_to_clips",
    "pixels_to_images",
    "read_metadata",
    "save_clip",
    "save_image",
]
