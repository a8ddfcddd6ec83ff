"""Images and videos of dataset rows: checked when the run starts, decoded when a question is asked.

A source is what a row holds. Image: a path (relative ones start at the file's folder), bytes, a base64 data
URI, {"path":, "bytes":} as Hugging Face datasets store it, or {"image": source}. Video: the same four,
{"video": source}, or a list of images (its frames), also as {"frames": [...], "fps": 4}. A source that is a dict may
change the rules for itself: {"video": "a.mp4", "fps": 1, "max_pixels": 200000}. Every problem is a ValueError;
callers say where it is.
"""
from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from copd_megatron.tasks.frames import MediaRules
from copd_megatron.types import FrameSample, Media

DEFAULT_RULES = MediaRules()
LIST_FPS = 2.0
"""Frames per second of a list of frames that does not say."""

_PIL_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)  # the PNG reader raises SyntaxError


def check(kind: str, source: Any, folder: Path) -> None:
    """``check_image`` or ``check_video``."""
    (check_image if kind == "image" else check_video)(source, folder)


def load(kind: str, source: Any, folder: Path, rules: MediaRules = DEFAULT_RULES) -> Media:
    """``load_image`` or ``load_video``."""
    return (load_image if kind == "image" else load_video)(source, folder, rules)


def read_bytes(kind: str, source: Any, folder: Path, take: Callable[[bytes], Any]) -> float | None:
    """Hand the bytes of an image, of a video file or of all frames of a list to ``take``; nothing is decoded.

    Returns:
        The frames per second that a list of frames says, None for anything else.
    """
    frames, fps = _frame_list(source) if kind == "video" else (None, None)
    for part in [source] if frames is None else frames:
        opened = _opened(part, folder)
        with open(opened, "rb") if isinstance(opened, str) else opened as file:
            while block := file.read(1 << 20):
                take(block)
        take(b"|")
    return None if frames is None else fps


def check_image(source: Any, folder: Path) -> None:
    """Raise ValueError unless the source opens as an image and its checksums hold, without decoding its
    pixels."""
    try:
        with Image.open(_opened(source, folder)) as image:
            image.verify()
    except _PIL_ERRORS as error:
        raise ValueError(_reason(source, "image", error)) from error


def load_image(source: Any, folder: Path, rules: MediaRules = DEFAULT_RULES) -> Media:
    """Decode to RGB, upright by its EXIF entry, transparent pixels on white. Pixels are [H, W, 3] uint8."""
    rules = rules.for_source("image", source)
    try:
        with Image.open(_opened(source, folder)) as image:
            return Media("image", _to_rgb(ImageOps.exif_transpose(image)), pixel_budget=rules.image_pixels)
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
        with av.open(_opened(source, folder)) as container:
            if not container.streams.video:
                raise ValueError(f"{_shown(source)} holds no video stream")
            next(container.decode(video=0))
    except (av.FFmpegError, OSError, StopIteration) as error:
        raise ValueError(_reason(source, "video", error)) from error


def load_video(source: Any, folder: Path, rules: MediaRules = DEFAULT_RULES) -> Media:
    """Decode a video to [frames, H, W, 3] uint8 with the frames per second of these frames.

    Of a file the frames that ``rules`` pick. A list of frames is taken whole, or evenly thinned to ``max_frames``; its
    frames must share one size.
    """
    frames, frames_fps = _frame_list(source)
    if frames is not None and isinstance(source, Mapping):
        source = {**source, "fps": None}  # there it says what the frames are, not what to take
    rules = rules.for_source("video", source)
    if frames is not None:
        kept = np.linspace(0, len(frames) - 1, min(len(frames), rules.max_frames)).round().astype(int)
        pixels = [load_image(frames[index], folder).pixels for index in kept]
        if len({frame.shape for frame in pixels}) > 1:
            raise ValueError(f"frames of different sizes {sorted({frame.shape[:2] for frame in pixels})}")
        return Media("video", np.stack(pixels), frames_fps * len(kept) / len(frames), pixel_budget=rules.video_pixels)
    import av

    try:
        with av.open(_opened(source, folder)) as container:
            total, fps = _length_of(container)
        wanted = rules.frames_of(max(total, 1), fps)
        with av.open(_opened(source, folder)) as container:
            found, pixels = _frames_at(container, wanted)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(_reason(source, "video", error)) from error
    if not pixels:
        raise ValueError(f"{_shown(source)} holds no frame that decodes")
    sample = FrameSample(tuple(found), total, fps)
    return Media("video", np.stack(pixels), len(found) / total * fps, sample, rules.video_pixels)


def _length_of(container: Any) -> tuple[int, float]:
    """Frames of a video, counted from its packets (containers do not always know, or lie), and how many a second."""
    stream = container.streams.video[0]
    packets = [packet for packet in container.demux(stream) if packet.pts is not None]
    if stream.average_rate or not packets:
        return len(packets), float(stream.average_rate or LIST_FPS)
    end = max(packet.pts + (packet.duration or 0) for packet in packets)
    length_s = float((end - min(packet.pts for packet in packets)) * stream.time_base)
    return len(packets), len(packets) / length_s if length_s > 0 else LIST_FPS


def _frames_at(container: Any, indices: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """The frames at ascending indices, as far as the video decodes, and their indices."""
    wanted, found, pixels = set(indices.tolist()), [], []
    for index, frame in enumerate(container.decode(video=0)):
        if index in wanted:
            found.append(index)
            # One thread: PyAV keeps its converter's threads for later calls, and a forked process lacks them.
            pixels.append(frame.to_ndarray(format="rgb24", threads=1))
        if index >= indices[-1]:
            break
    return found, pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):  # PIL would clip 16-bit grey instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _frame_list(source: Any) -> tuple[Sequence[Any] | None, float]:
    """The frames and their rate, (None, ...) if the source is a file."""
    fps = LIST_FPS
    if isinstance(source, Mapping) and isinstance(source.get("video"), list):
        source = {**source, "frames": source["video"]}
    if isinstance(source, Mapping) and source.get("frames") is not None:
        fps = LIST_FPS if source.get("fps") is None else float(source["fps"])
        source = source["frames"]
    if isinstance(source, (str, bytes, Mapping)) or not isinstance(source, Sequence):
        return None, fps
    if not source:
        raise ValueError("a video without frames")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps is {fps}; allowed is a number above 0")
    return source, fps


def _file_of(source: Any) -> Any:
    """The path, address or bytes of a source."""
    if not isinstance(source, Mapping):
        return source
    if source.get("bytes") is not None:
        return source["bytes"]
    places = ("image", "video", "path", "url")
    return next((_file_of(source[key]) for key in places if source.get(key) is not None), None)


def _opened(source: Any, folder: Path) -> BinaryIO | str:
    """What PIL and PyAV open: a buffer or a path."""
    source = _file_of(source)
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise ValueError(f"a data URI that is no base64: {error}") from error
    if isinstance(source, str) and source:
        source = source.removeprefix("file://")
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
        source = source.get("path") or _file_of(source)
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
