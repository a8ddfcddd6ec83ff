"""Pictures for reports: small, bounded, readable back."""
import io

import numpy as np
import pytest
from PIL import Image

from copd_megatron.metrics.media_strip import MAX_BYTES, MAX_FRAMES, strip_png
from copd_megatron.types import Media


def open_png(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return image


def test_a_small_image_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), np.uint8)
    image = open_png(strip_png(Media("image", pixels)))
    assert image.size == (48, 40)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), pixels)


def test_a_video_shows_first_and_last_frame_in_a_row():
    pixels = np.stack([np.full((20, 30, 3), 10 * t, np.uint8) for t in range(13)])
    strip = np.asarray(open_png(strip_png(Media("video", pixels))).convert("RGB"))
    assert strip.shape[:2] == (20, 30 * MAX_FRAMES + 2 * (MAX_FRAMES - 1))
    assert strip[0, 0, 0] == 0 and strip[0, -1, 0] == 120


@pytest.mark.parametrize("kind, shape", [("image", (900, 1400, 3)), ("video", (9, 600, 400, 3))])
def test_noise_of_any_size_is_bounded(kind, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    content = strip_png(Media(kind, pixels))
    assert len(content) <= MAX_BYTES
    assert open_png(content).size[0] > 16


def test_one_frame_is_a_video_too():
    assert open_png(strip_png(Media("video", np.zeros((1, 8, 8, 3), np.uint8)))).size == (8, 8)
