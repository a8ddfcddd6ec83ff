"""Questions whose every answer earns something, so that even a random tiny model has a reward to learn from."""
from __future__ import annotations

import numpy as np

from copd_megatron.types import Media, TaskItem


class LetterTask:
    """Reward: share of the answer's characters whose code is, modulo 3, the letter's. Endless, or ``count``
    questions."""

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
        hits = sum(ord(c) % 3 == ord(item.answer) % 3 for c in completion)
        return {"accuracy": hits / max(1, len(completion)), "format": float(bool(completion))}

    def extract(self, completion):
        return completion or None
