"""Questions a random tiny model can learn to answer: the verifier likes some letters of the answer."""
from __future__ import annotations

import numpy as np

from copd_megatron.types import Media, TaskItem


class LetterTask:
    """Reward: share of the wanted letter among the answer's characters. Endless, or ``count`` questions."""

    def __init__(self, letter: str = "a", media: str | None = None, count: int | None = None):
        self.letter, self.media, self.count = letter, media, count

    def size(self, split):
        return self.count

    def item(self, split, index):
        rng = np.random.default_rng([index, split == "train", ord(self.letter)])
        # Prompts of different lengths, so that nothing may rely on equal ones.
        text = " ".join("abcdefgh"[i] for i in rng.integers(0, 8, 2 + index % 3))
        if self.media is None:
            return TaskItem(f"{self.letter}/{split}/{index}", [{"role": "user", "content": text}], (), self.letter)
        shape = (32, 32, 3) if self.media == "image" else (4, 32, 32, 3)
        pixels = rng.integers(0, 255, shape).astype(np.uint8)
        content = [{"type": self.media}, {"type": "text", "text": text}]
        return TaskItem(f"{self.letter}/{split}/{index}", [{"role": "user", "content": content}],
                        (Media(self.media, pixels),), self.letter)

    def verify(self, item, completion):
        return {"accuracy": completion.count(item.answer) / max(1, len(completion)), "format": float(bool(completion))}

    def extract(self, completion):
        return completion or None
