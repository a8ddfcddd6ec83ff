"""Image questions: the family's promises, and every answer read again from the pixels."""
import numpy as np
import pytest

from copd_megatron.tasks.image import ImageTask
from copd_megatron.tasks.render import COLOURS
from support.procedural_contract import ProceduralContract, seen_by_the_model


class TestImage(ProceduralContract):
    family = ImageTask


def masks(pixels: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """(colour, cell 1 to 9) -> [16, 16] bool, for every cell where that colour is."""
    found = {}
    for name, colour in COLOURS.items():
        for cell in range(9):
            top, left = 16 * (cell // 3), 16 * (cell % 3)
            mask = (pixels[top:top + 16, left:left + 16] == colour).all(-1)
            if mask.any():
                found[name, cell + 1] = mask
    return found


@pytest.mark.parametrize("kind", ImageTask.kinds)
def test_answers_follow_from_the_pixels(kind):
    task = ImageTask(kinds=[kind])
    for index in range(150):
        item = task.item("train", index)
        text, found = seen_by_the_model(item)[0], masks(item.media[0].pixels)
        if kind == "compare":
            answer = max(found, key=lambda key: found[key].sum())[0]
        else:
            cells = [cell for colour, cell in found if colour in text]
            answer = str(len(cells)) if kind == "count" else str(*cells)
        assert answer == item.answer, text


def test_one_picture_of_nine_cells_precedes_the_question():
    item = ImageTask().item("train", 0)
    assert [part["type"] for part in item.messages[0]["content"]] == ["image", "text"]
    assert item.media[0].kind == "image" and item.media[0].pixels.shape == (48, 48, 3)
