"""Decoded images and videos, kept by the content of their source within a byte budget.

Reading and hashing a video file takes a hundredth of decoding it, and an epoch asks for every video again.
"""
from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

from copd_megatron.tasks.frames import MediaRules
from copd_megatron.tasks.media import load, read_bytes
from copd_megatron.types import Media


class MediaCache:
    """Example: ``MediaCache(1 << 30).load("video", "a.mp4", folder, MediaRules(fps=1))``."""

    def __init__(self, budget_bytes: int) -> None:
        """Least recently used media are dropped beyond the budget; 0 keeps none."""
        self.budget_bytes, self.held_bytes, self.decoded = budget_bytes, 0, 0
        self._media: OrderedDict[tuple, Media] = OrderedDict()

    def load(self, kind: str, source: Any, folder: Path, rules: MediaRules) -> Media:
        """As ``media.load``; the caller may change the pixels."""
        if not self.budget_bytes:
            return load(kind, source, folder, rules)
        digest = hashlib.sha256()
        fps = read_bytes(kind, source, folder, digest.update)
        key = (kind, digest.digest(), fps, rules.for_source(kind, source))
        media = self._media.get(key)
        if media is None:
            media = load(kind, source, folder, rules)
            self.decoded += 1
            self._keep(key, media)
        else:
            self._media.move_to_end(key)
        return replace(media, pixels=media.pixels.copy())

    def _keep(self, key: tuple, media: Media) -> None:
        if media.pixels.nbytes > self.budget_bytes:
            return
        self._media[key] = media
        self.held_bytes += media.pixels.nbytes
        while self.held_bytes > self.budget_bytes:
            _, dropped = self._media.popitem(last=False)
            self.held_bytes -= dropped.pixels.nbytes
