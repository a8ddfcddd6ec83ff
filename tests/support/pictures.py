"""Random media and questions about them."""
from __future__ import annotations

import numpy as np

from copd_megatron.types import Media, TaskItem


def picture(seed: int, height: int, width: int) -> Media:
    """An image of noise."""
    return Media("image", np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def clip(seed: int, frames: int, height: int, width: int, fps: float = 2.0) -> Media:
    """A video of noise."""
    shape = (frames, height, width, 3)
    return Media("video", np.random.default_rng(seed).integers(0, 256, shape, np.uint8), fps)


def question(key: str, *media: Media, text: str = "how many?") -> TaskItem:
    """A question that shows its media in order, with words between them; plain text without media."""
    if not media:
        return TaskItem(key, [{"role": "user", "content": text}], (), "1")
    parts = [part for medium in media for part in ({"type": medium.kind}, {"type": "text", "text": " and "})]
    return TaskItem(key, [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], media, "1")


def mixed_questions() -> list[TaskItem]:
    """Text; two images of different sizes; a video with an odd number of frames; videos around an image."""
    return [
        question("text", text="2 + 3 = "),
        question("images", picture(1, 48, 48), picture(2, 32, 64)),
        question("video", clip(3, 5, 32, 48)),
        question("mixed", clip(4, 4, 32, 32, fps=4.0), picture(5, 48, 32), clip(6, 2, 32, 32)),
    ]
