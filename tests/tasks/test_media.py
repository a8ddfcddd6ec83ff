"""Images and videos decode to what was drawn, and everything that does not open says so."""
import base64
import io
import wave
from functools import partial

import av
import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata
from transformers.video_utils import load_video as hf_load_video

from copd_megatron.tasks.frames import MediaRules
from copd_megatron.tasks.media import check_image, check_video, load_image, load_video
from copd_megatron.types import FrameSample


def png(colour="red", size=(6, 4), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_video(path, frames, fps, codec="mpeg4"):
    """Frame i is grey of brightness 5 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = 48
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            grey = np.full((48, 48, 3), 5 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))


def brightness(media):
    return media.pixels.mean(axis=(1, 2, 3))


def test_every_source_of_an_image_gives_the_same_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    for source in ("a.png", str(tmp_path / "a.png"), png(), {"bytes": png(), "path": None},
                   {"bytes": None, "path": "a.png"}, uri):
        check_image(source, tmp_path)
        media = load_image(source, tmp_path)
        assert media.kind == "image" and media.pixels.shape == (4, 6, 3) and media.pixels.dtype == np.uint8
        assert (media.pixels == [255, 0, 0]).all()


def test_modes_become_rgb(tmp_path):
    assert (load_image(png((0, 0, 0, 0), mode="RGBA"), tmp_path).pixels == 255).all()  # clear is white
    assert (load_image(png(0x8000, mode="I;16"), tmp_path).pixels == 0x80).all()
    assert (load_image(png(1, mode="1"), tmp_path).pixels == 255).all()
    upright = Image.new("RGB", (6, 4))
    exif = upright.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", exif=exif)
    assert load_image(buffer.getvalue(), tmp_path).pixels.shape == (6, 4, 3)


def damaged_png():
    data = bytearray(png(size=(64, 64)))
    data[60] ^= 255  # inside the pixel data: the checksum no longer holds
    return bytes(data)


@pytest.mark.parametrize("source, message", [
    (b"", "unknown format, or empty"), (b"junk", "a value of 4 bytes does not open as image"),
    ("missing.png", "no file .*missing.png"), (damaged_png(), "does not open as image"),
    (None, "neither a path"),
    ("", "neither a path"), (3, "neither a path"), ({"path": None, "bytes": None}, "neither a path"),
    ("https://example.org/a.png", "is an address"), ("data:image/png;base64,***", "no base64"),
])
def test_image_that_does_not_open(source, message, tmp_path):
    for action in (check_image, load_image):
        if source == damaged_png() and action is load_image:
            continue  # decoders may repair what the check refuses
        with pytest.raises(ValueError, match=message):
            action(source, tmp_path)


@pytest.mark.parametrize("rule", ["qwen3_vl", "qwen2_vl"])
@pytest.mark.parametrize("settings", [{}, {"fps": 5}, {"max_frames": 4}, {"fps": 100}, {"fps": 0.1}])
def test_video_file_is_read_as_the_processors_of_transformers_read_it(settings, rule, tmp_path):
    write_video(tmp_path / "a.mp4", frames=41, fps=10)
    content = (tmp_path / "a.mp4").read_bytes()
    processor = {"qwen3_vl": Qwen3VLVideoProcessor, "qwen2_vl": Qwen2VLVideoProcessor}[rule]()
    processor.max_frames = settings.get("max_frames", 768)
    frames, about = hf_load_video(str(tmp_path / "a.mp4"), backend="pyav", sample_indices_fn=partial(
        processor.sample_frames, fps=settings.get("fps", 2)))
    for source in ("a.mp4", {"video": "a.mp4"}, content, {"bytes": content, "path": None},
                   {"video": "a.mp4", **settings}):
        check_video(source, tmp_path)
        inside = isinstance(source, dict) and len(source) > 1 and "bytes" not in source
        media = load_video(source, tmp_path, MediaRules(frame_rule=rule, **({} if inside else settings)))
        np.testing.assert_array_equal(media.pixels, frames)
        assert media.sample == FrameSample(tuple(about.frames_indices), 41, 10.0)
        assert media.fps == pytest.approx(about.sampled_fps)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 100, 4001])
def test_frame_rules_equal_the_processors(total):
    for rule, processor in (("qwen3_vl", Qwen3VLVideoProcessor()), ("qwen2_vl", Qwen2VLVideoProcessor())):
        for source_fps, fps in ((30.0, 2.0), (29.97, 1.0), (10.0, 25.0), (24.0, 0.3)):
            if rule == "qwen2_vl" and total == 1:
                continue  # that processor divides by zero
            want = processor.sample_frames(VideoMetadata(total_num_frames=total, fps=source_fps), fps=fps)
            got = MediaRules(fps=fps, frame_rule=rule).frames_of(total, source_fps)
            assert got.tolist() == want.tolist(), (rule, source_fps, fps)
    assert MediaRules(frame_rule="qwen2_vl").frames_of(1, 10.0).tolist() == [0]


def test_list_of_frames_is_a_video(tmp_path):
    frames = [png((shade, shade, shade)) for shade in (0, 100, 200)]
    check_video(frames, tmp_path)
    media = load_video(frames, tmp_path)
    assert media.pixels.shape == (3, 4, 6, 3) and media.fps == 2.0
    np.testing.assert_array_equal(brightness(media), [0, 100, 200])
    thinned = load_video({"frames": frames, "fps": 6, "max_frames": 2}, tmp_path)
    np.testing.assert_array_equal(brightness(thinned), [0, 200])
    assert thinned.fps == 4.0


@pytest.mark.parametrize("source, message", [
    (b"junk", "does not open as video"), ("missing.mp4", "no file"), ([], "without frames"),
    ([b"junk"], "does not open as image"), ({"frames": [png()], "fps": 0}, "fps is 0"), (7, "neither a path"),
])
def test_video_that_does_not_open(source, message, tmp_path):
    for action in (check_video, load_video):
        with pytest.raises(ValueError, match=message):
            action(source, tmp_path)


def test_frames_of_two_sizes_and_files_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="different sizes"):
        load_video([png(), png(size=(5, 5))], tmp_path)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(160))
    with pytest.raises(ValueError, match="no video stream"):
        check_video("sound.wav", tmp_path)
