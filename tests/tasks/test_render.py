"""Drawn shapes: where they are, what they look like, and that the same call draws the same picture."""
import numpy as np
import pytest

from copd_megatron.tasks.render import CELL_PIXELS, COLOURS, SHAPES, Shape, draw_frame, shape_in_cell


@pytest.mark.parametrize("grid", [2, 3])
@pytest.mark.parametrize("form", SHAPES)
def test_a_shape_stays_inside_its_cell(form, grid):
    rng = np.random.default_rng(0)
    for cell in range(grid * grid):
        frame = draw_frame([shape_in_cell(rng, form, "red", cell, grid, 6)], grid)
        rows, columns = np.nonzero(frame.any(-1))
        assert set(rows // CELL_PIXELS) == {cell // grid}
        assert set(columns // CELL_PIXELS) == {cell % grid}


def test_colours_forms_and_sizes_can_be_told_apart():
    def draw(form, colour, radius):
        return draw_frame([Shape(form, colour, (24, 24), radius)], 3).tobytes()

    pictures = {draw(form, colour, radius) for form in SHAPES for colour in COLOURS for radius in range(3, 8)}
    assert len(pictures) == len(SHAPES) * len(COLOURS) * 5


def test_a_square_covers_its_width_and_later_shapes_are_on_top():
    below, above = Shape("square", "red", (24, 24), 6), Shape("square", "blue", (24, 24), 3)
    frame = draw_frame([below, above], 3, background=9)
    assert frame.shape == (48, 48, 3) and frame.dtype == np.uint8
    assert (frame == COLOURS["blue"]).all(-1).sum() == 36
    assert (frame == COLOURS["red"]).all(-1).sum() == 144 - 36
    assert (frame == 9).all(-1).sum() == 48 * 48 - 144


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="unknown form 'star'"):
        draw_frame([Shape("star", "red", (8, 8), 4)], 3)
