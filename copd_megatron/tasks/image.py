"""Image questions over drawn shapes: count, locate, compare."""
from __future__ import annotations

import numpy as np

from copd_megatron.tasks.procedural import ProceduralTask, Question
from copd_megatron.tasks.render import COLOURS, SHAPES, Shape, draw_background, draw_frame, shape_in_cell
from copd_megatron.types import Media

GRID = 3
CELLS = GRID * GRID
_COLOURS = tuple(COLOURS)


def count_shapes(rng: np.random.Generator, level: int) -> Question:
    """How many shapes of one form (0 to 6), beside ``level`` - 1 of other forms (one where none is to be counted)."""
    form = SHAPES[rng.integers(len(SHAPES))]
    others = [other for other in SHAPES if other != form]
    count = int(rng.integers(0, 7))
    distractors = max(level - 1, int(count == 0))
    cells = rng.permutation(CELLS)
    shapes = [_draw_shape(rng, form, cell) for cell in cells[:count]]
    shapes += [_draw_shape(rng, others[rng.integers(len(others))], cell) for cell in cells[count:count + distractors]]
    return _ask(rng, f"how many {form}s?", str(count), shapes)


def locate_shape(rng: np.random.Generator, level: int) -> Question:
    """Which of the 9 cells holds the only shape of one form, among level - 1 up to 2 * level - 1 others."""
    form = SHAPES[rng.integers(len(SHAPES))]
    others = [other for other in SHAPES if other != form]
    cells = rng.permutation(CELLS)
    distractors = int(rng.integers(level - 1, 2 * level))
    shapes = [_draw_shape(rng, form, cells[0])]
    shapes += [_draw_shape(rng, others[rng.integers(len(others))], cell) for cell in cells[1:1 + distractors]]
    return _ask(rng, f"which cell has the {form}?", str(cells[0] + 1), shapes)


def compare_sizes(rng: np.random.Generator, level: int) -> Question:
    """The colour of the largest among level + 1 shapes of different colours."""
    count = level + 1
    colours = [_COLOURS[i] for i in rng.permutation(len(_COLOURS))[:count]]
    cells = rng.permutation(CELLS)
    form = SHAPES[rng.integers(len(SHAPES))]
    radii = [7] + [int(radius) for radius in rng.integers(3, 6, size=count - 1)]
    shapes = [shape_in_cell(rng, form, colour, cell, GRID, radius)
              for colour, cell, radius in zip(colours, cells, radii)]
    return _ask(rng, f"colour of the largest {form}?", colours[0], shapes)


def _draw_shape(rng: np.random.Generator, form: str, cell: int) -> Shape:
    return shape_in_cell(rng, form, _COLOURS[rng.integers(len(_COLOURS))], cell, GRID, int(rng.integers(5, 8)))


def _ask(rng: np.random.Generator, text: str, answer: str, shapes: list[Shape]) -> Question:
    return Question(text, answer, (Media("image", draw_frame(shapes, GRID, draw_background(rng))),))


class ImageTask(ProceduralTask):
    """Questions about one 48 x 48 picture; blind guessing scores about 14 %."""

    domain = "image"
    kinds = {"count": count_shapes, "locate": locate_shape, "compare": compare_sizes}

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple("0123456789") + _COLOURS
