"""How media are read: which frames of a video, and how many pixels; rules as Qwen-VL's processors state them.

With ``total`` frames in the file at ``source_fps``, n = total / source_fps * fps, at least ``min_frames``, at most
``max_frames`` and ``total``. Qwen3-VL takes int(n) frames from the first to the last, evenly spaced
(``Qwen3VLVideoProcessor.sample_frames``); Qwen2-VL and Qwen2.5-VL the largest even number below, at even steps from the
first (``Qwen2VLVideoProcessor.sample_frames``).
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

FrameRule = Literal["qwen3_vl", "qwen2_vl"]
Budget = tuple[int | None, int | None]
"""(least, most) pixels; None: as the backbone's processor has it."""

_PAIR = 2
"""Frames that Qwen-VL's vision towers merge into one."""


@dataclass(frozen=True)
class MediaRules:
    """How the media of a data set are read. Example: ``MediaRules(fps=1.0, max_frames=32)``."""

    fps: float = 2.0
    """Frames per second that are taken from a video file."""
    min_frames: int = 4
    """Fewest frames of a video that has so many."""
    max_frames: int = 768
    frame_rule: FrameRule = "qwen3_vl"
    """Whose arithmetic picks the frames; qwen2_vl is Qwen2.5-VL's, too."""
    image_pixels: Budget = (None, None)
    video_pixels: Budget = (None, None)

    def __post_init__(self) -> None:
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps is {self.fps}; allowed is a number above 0")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(f"min_frames and max_frames are {self.min_frames} and {self.max_frames}; allowed is 1 or "
                             "more, the least first")
        for name in ("image_pixels", "video_pixels"):
            budget = getattr(self, name)
            given = [limit for limit in budget if limit is not None]
            if len(budget) != 2 or any(limit < 1 for limit in given) or sorted(given) != given:
                raise ValueError(f"{name} is {budget}; allowed is (least, most) pixels, 1 or more")
        if self.frame_rule not in ("qwen3_vl", "qwen2_vl"):
            raise ValueError(f"frame_rule is {self.frame_rule!r}; allowed are qwen3_vl and qwen2_vl")

    def for_source(self, kind: str, source: Any) -> MediaRules:
        """These rules with what a row says of one medium: {"video": ..., "fps": 1, "max_pixels": 200000}.

        Raises:
            ValueError: values that are not allowed.
        """
        if not isinstance(source, Mapping):
            return self
        given = {key: source[key] for key in ("fps", "min_frames", "max_frames", "min_pixels", "max_pixels")
                 if source.get(key) is not None}
        if not given:
            return self
        least, most = (given.pop(key, None) for key in ("min_pixels", "max_pixels"))
        if "max_frames" in given:
            given.setdefault("min_frames", min(self.min_frames, given["max_frames"]))
        own = getattr(self, f"{kind}_pixels")
        given[f"{kind}_pixels"] = (own[0] if least is None else least, own[1] if most is None else most)
        return replace(self, **given)

    def frames_of(self, total: int, source_fps: float) -> np.ndarray:
        """[n] int64 ascending indices of the frames to take from ``total`` >= 1."""
        wanted = total / source_fps * self.fps
        if self.frame_rule == "qwen2_vl" and total >= _PAIR:
            most = min(self.max_frames, total) // _PAIR * _PAIR
            count = max(_PAIR, math.floor(min(max(wanted, self.min_frames), most)) // _PAIR * _PAIR)
            # Steps of total / count from 0; the last one stays below total.
            return (np.arange(count) * (total / count)).astype(np.int64)
        count = min(max(int(wanted), self.min_frames), self.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(np.int64)
