"""A small PNG of an image or of a few video frames side by side, bounded in pixels and bytes."""
from __future__ import annotations

import io

import numpy as np
from PIL import Image

from copd_megatron.types import Media

MAX_SIDE = 256
"""Pixels of the longer side of an image, and of the strip's height for a video."""
MAX_FRAMES = 6
MAX_BYTES = 48 * 1024
_GAP = 2


def strip_png(media: Media, max_side: int = MAX_SIDE, max_bytes: int = MAX_BYTES) -> bytes:
    """PNG of an image ([H, W, 3] uint8), or of at most ``MAX_FRAMES`` evenly spaced video frames in a row.

    Nothing is enlarged; large pictures shrink until the PNG fits ``max_bytes``.
    """
    if media.kind == "image":
        frames = [media.pixels]
    else:
        count = len(media.pixels)
        picks = np.unique(np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int))
        frames = [media.pixels[i] for i in picks]
        max_side //= 2
    while True:
        content = _encode(frames, max_side)
        if len(content) <= max_bytes or max_side <= 16:
            return content
        max_side = max_side * 3 // 4


def _encode(frames: list[np.ndarray], max_side: int) -> bytes:
    images = [Image.fromarray(np.asarray(f, np.uint8)).convert("RGB") for f in frames]
    for image in images:
        image.thumbnail((max_side, max_side))
    width = sum(i.width for i in images) + _GAP * (len(images) - 1)
    strip = Image.new("RGBA", (width, max(i.height for i in images)))
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width + _GAP
    buffer = io.BytesIO()
    strip.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
