"""Media are decoded once for equal content and rules, within the budget; copies are the caller's own."""
import numpy as np
from PIL import Image

from copd_megatron.tasks.frames import MediaRules
from copd_megatron.tasks.media import load
from copd_megatron.tasks.media_cache import MediaCache

RULES = MediaRules()
SIZE = 8 * 8 * 3


def picture(path, shade):
    Image.new("RGB", (8, 8), (shade,) * 3).save(path)
    return path


def test_equal_content_is_decoded_once_whatever_its_name(tmp_path):
    one, two = picture(tmp_path / "a.png", 1), tmp_path / "b.png"
    two.write_bytes(one.read_bytes())
    cache = MediaCache(10 * SIZE)
    sources = ["a.png", "b.png", one.read_bytes(), {"path": "a.png", "bytes": None}]
    for source in sources:
        media = cache.load("image", source, tmp_path, RULES)
        np.testing.assert_array_equal(media.pixels, load("image", source, tmp_path).pixels)
        media.pixels[:] = 99  # the caller's own
    assert cache.decoded == 1
    other = {"image": "a.png", "max_pixels": 50}
    assert cache.load("image", other, tmp_path, RULES).pixel_budget == (None, 50) and cache.decoded == 2
    picture(tmp_path / "a.png", 2)  # another content under the same name
    assert cache.load("image", "a.png", tmp_path, RULES).pixels.flat[0] == 2 and cache.decoded == 3


def test_a_list_of_frames_is_known_by_its_frames_and_their_rate(tmp_path):
    frames = [str(picture(tmp_path / f"{n}.png", n)) for n in range(3)]
    cache = MediaCache(100 * SIZE)
    for fps in (2, 2, 4):
        media = cache.load("video", {"frames": frames, "fps": fps}, tmp_path, RULES)
        assert media.fps == fps and media.pixels.shape == (3, 8, 8, 3)
    cache.load("video", frames[::-1], tmp_path, RULES)
    assert cache.decoded == 3


def test_the_budget_holds_and_the_least_recently_used_go(tmp_path):
    for n in range(4):
        picture(tmp_path / f"{n}.png", n)
    cache = MediaCache(2 * SIZE)
    for n in (0, 1, 0, 2, 0, 1):
        assert cache.load("image", f"{n}.png", tmp_path, RULES).pixels.flat[0] == n
        assert cache.held_bytes <= 2 * SIZE
    assert cache.decoded == 4, "0 stays, 1 is decoded twice"
    for budget in (0, SIZE - 1):
        small = MediaCache(budget)
        small.load("image", "0.png", tmp_path, RULES)
        assert small.held_bytes == 0
