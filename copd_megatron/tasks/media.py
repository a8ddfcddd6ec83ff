"""Images and videos of dataset rows: checked when the run starts, decoded when a question is asked.

A source is what a row holds. Image: a path (relative ones start at the file's folder), bytes, a base64 data
URI, or {"path":, "bytes":} as Hugging Face datasets store it. Video: the same four, {"video": source}, or a
list of images (its frames), also as {"frames": [...], "fps": 4}. Every problem is a ValueError; callers say
where it is.
"""
from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from copd_megatron.types import Media

DEFAULT_FPS = 2.0
"""Frames per second that are taken from a video file, and those of a list of frames that does not say."""

_PIL_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)  # the PNG reader raises SyntaxError


def check_image(source: Any, folder: Path) -> None:
    """Raise ValueError unless the source opens as an image and its checksums hold, without decoding its
    pixels."""
    try:
        with Image.open(_opened(source, folder)) as image:
            image.verify()
    except _PIL_ERRORS as error:
        raise ValueError(_reason(source, "image", error)) from error


def load_image(source: Any, folder: Path) -> Media:
    """Decode to RGB, upright by its EXIF entry, transparent pixels on white. Pixels are [H, W, 3] uint8."""
    try:
        with Image.open(_opened(source, folder)) as image:
            return Media("image", _to_rgb(ImageOps.exif_transpose(image)))
    except _PIL_ERRORS as error:
        raise ValueError(_reason(source, "image", error)) from error


def check_video(source: Any, folder: Path) -> None:
    """Raise ValueError unless all frames of a list open as images, or the file's first frame decodes."""
    frames, _ = _frame_list(source)
    if frames is not None:
        for frame in frames:
            check_image(frame, folder)
        return
    import av

    try:
        with av.open(_opened(_file_of(source), folder)) as container:
            if not container.streams.video:
                raise ValueError(f"{_shown(source)} holds no video stream")
            next(container.decode(video=0))
    except (av.FFmpegError, OSError, StopIteration) as error:
        raise ValueError(_reason(source, "video", error)) from error


def load_video(source: Any, folder: Path, *, fps: float = DEFAULT_FPS, max_frames: int = 64) -> Media:
    """Decode a video to [frames, H, W, 3] uint8 with the ``fps`` of these frames.

    A file is read at ``fps``, or slower where it holds fewer or that would be over ``max_frames`` frames. A
    list of frames is taken whole, or evenly thinned to ``max_frames``; its frames must share one size.
    """
    frames, frames_fps = _frame_list(source)
    if frames is not None:
        kept = np.linspace(0, len(frames) - 1, min(len(frames), max_frames)).round().astype(int)
        pixels = [load_image(frames[index], folder).pixels for index in kept]
        if len({frame.shape for frame in pixels}) > 1:
            raise ValueError(f"frames of different sizes {sorted({frame.shape[:2] for frame in pixels})}")
        return Media("video", np.stack(pixels), frames_fps * len(kept) / len(frames))
    import av

    try:
        with av.open(_opened(_file_of(source), folder)) as container:
            length_s, count = _length_of(container)
        interval_s = max(1 / fps, length_s / min(max_frames, max(count, 1)))
        with av.open(_opened(_file_of(source), folder)) as container:
            pixels = _frames_every(container, interval_s)[:max_frames]
    except (av.FFmpegError, OSError) as error:
        raise ValueError(_reason(source, "video", error)) from error
    if not pixels:
        raise ValueError(f"{_shown(source)} holds no frame that decodes")
    return Media("video", np.stack(pixels), 1 / interval_s)


def _length_of(container: Any) -> tuple[float, int]:
    """Seconds and frames of a video, counted from its packets: containers do not always know, or lie."""
    stream = container.streams.video[0]
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    if not packets:
        return 0.0, 0
    end = max(packet.pts + (packet.duration or 0) for packet in packets)
    return float((end - min(packet.pts for packet in packets)) * stream.time_base), len(packets)


def _frames_every(container: Any, interval_s: float) -> list[np.ndarray]:
    """The first frame at or after each multiple of the interval; a late one stands for all it covers."""
    pixels, next_s, first_s = [], 0.0, None
    for frame in container.decode(video=0):
        time_s = frame.time if frame.time is not None else next_s
        first_s = time_s if first_s is None else first_s
        if time_s - first_s >= next_s - 1e-6:
            pixels.append(frame.to_ndarray(format="rgb24"))
            next_s = (math.floor((time_s - first_s) / interval_s + 1e-6) + 1) * interval_s
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):  # PIL would clip 16-bit grey instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _frame_list(source: Any) -> tuple[Sequence[Any] | None, float]:
    """The frames and their rate, (None, ...) if the source is a file."""
    fps = DEFAULT_FPS
    if isinstance(source, Mapping) and source.get("frames") is not None:
        fps = DEFAULT_FPS if source.get("fps") is None else float(source["fps"])
        source = source["frames"]
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Sequence):
        return None, fps
    if not source:
        raise ValueError("a video without frames")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; allowed is a number above 0")
    return source, fps


def _file_of(source: Any) -> Any:
    return source["video"] if isinstance(source, Mapping) and source.get("video") is not None else source


def _opened(source: Any, folder: Path) -> BinaryIO | str:
    """What PIL and PyAV open: a buffer or a path."""
    if isinstance(source, Mapping):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"a data URI that is no base64: {error}") from error
    if isinstance(source, str) and source:
        if "://" in source:
            raise ValueError(f"{_shown(source)} is an address; media are read from local files; download it")
        path = folder / source
        if not path.is_file():
            raise ValueError(f"no file {path}")
        return str(path)
    raise ValueError(f"{_shown(source)} is neither a path nor bytes")


def _shown(source: Any) -> str:
    """A source as an error names it, never its bytes."""
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("video") or source.get("bytes")
    if isinstance(source, (bytes, bytearray)):
        return f"a value of {len(source)} bytes"
    text = repr(source)
    return text if len(text) <= 120 else text[:117] + "..."


def _reason(source: Any, kind: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
        said = "unknown format, or empty"
    else:
        said = str(getattr(error, "strerror", None) or error)[:120] or "no frame"
    return f"{_shown(source)} does not open as {kind} ({said})"
