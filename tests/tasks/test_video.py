"""Video questions: the family's promises, and every answer read again from the frames."""
import numpy as np
import pytest

from copd_megatron.tasks.render import COLOURS
from copd_megatron.tasks.video import DIRECTIONS, FRAMES, ORDINALS, VideoTask
from support.procedural_contract import ProceduralContract, seen_by_the_model


class TestVideo(ProceduralContract):
    family = VideoTask


def colour_at(frame: np.ndarray) -> str:
    """The only colour in a frame."""
    return next(name for name, colour in COLOURS.items() if (frame == colour).all(-1).any())


@pytest.mark.parametrize("level", [1, 2, 3])
def test_motion_goes_where_the_answer_says(level):
    task = VideoTask(kinds=["direction"], levels=[level])
    for index in range(60):
        item = task.item("train", index)
        colour = next(COLOURS[name] for name in COLOURS if name in seen_by_the_model(item)[0])
        edges = [np.argwhere((frame == colour).all(-1)).min(0) for frame in item.media[0].pixels]
        dx, dy = DIRECTIONS[item.answer]
        assert (np.sign(np.diff(edges, axis=0)) == [dy, dx]).all()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_colours_come_in_the_order_that_is_asked_for(level):
    task = VideoTask(kinds=["order"], levels=[level])
    for index in range(60):
        item = task.item("train", index)
        asked = next(i for i, name in enumerate(ORDINALS) if name in seen_by_the_model(item)[0])
        assert colour_at(item.media[0].pixels[asked]) == item.answer


def test_shapes_of_the_asked_colour_are_counted_over_all_frames():
    task = VideoTask(kinds=["count"])
    for index in range(150):
        item = task.item("train", index)
        colour = next(COLOURS[name] for name in COLOURS if name in seen_by_the_model(item)[0])
        cells = item.media[0].pixels.reshape(FRAMES, 2, 16, 2, 16, 3)
        assert str((cells == colour).all(-1).any((2, 4)).sum()) == item.answer


def test_one_video_of_four_frames_precedes_the_question():
    item = VideoTask().item("train", 0)
    assert [part["type"] for part in item.messages[0]["content"]] == ["video", "text"]
    assert item.media[0].kind == "video" and item.media[0].pixels.shape == (FRAMES, 32, 32, 3)
