"""Image questions over drawn shapes: count, locate, compare."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copd_megatron.tasks.procedural import ProceduralTask, Question
from copd_megatron.tasks.render import COLOURS, SHAPES, Shape, draw_background, draw_frame, shape_in_cell
from copd_megatron.types import Media

GRID = 3
CELLS = GRID * GRID
_COLOURS = tuple(COLOURS)


def count_shapes(rng: np.random.Generator, level: int) -> Question:
    """How many shapes of one colour (0 to 6), beside ``level`` of other colours."""
    asked, *others = _shuffled_colours(rng)
    count = int(rng.integers(0, 7))
    colours = [asked] * count + [others[i] for i in rng.integers(len(others), size=min(level, CELLS - count))]
    return _ask(rng, f"how many {asked} shapes?", str(count), _scatter(rng, colours))


def locate_shape(rng: np.random.Generator, level: int) -> Question:
    """Which of the 9 cells, numbered from 1, holds the only shape of one colour, beside 2 * level - 1 others."""
    asked, *others = _shuffled_colours(rng)
    colours = [asked] + [others[i] for i in rng.integers(len(others), size=2 * level - 1)]
    cells = rng.permutation(CELLS)
    return _ask(rng, f"which cell is {asked}?", str(cells[0] + 1), _scatter(rng, colours, cells))


def compare_sizes(rng: np.random.Generator, level: int) -> Question:
    """The colour of the largest among level + 1 shapes of different colours."""
    count = level + 1
    colours = _shuffled_colours(rng)[:count]
    cells = rng.permutation(CELLS)
    form = SHAPES[rng.integers(len(SHAPES))]
    radii = [7] + [int(radius) for radius in rng.integers(3, 6, size=count - 1)]
    shapes = [shape_in_cell(rng, form, colour, cell, GRID, radius)
              for colour, cell, radius in zip(colours, cells, radii)]
    return _ask(rng, "colour of the largest?", colours[0], shapes)


def _shuffled_colours(rng: np.random.Generator) -> list[str]:
    return [_COLOURS[i] for i in rng.permutation(len(_COLOURS))]


def _scatter(rng: np.random.Generator, colours: Sequence[str], cells: np.ndarray | None = None) -> list[Shape]:
    """One shape of any form and size for each colour, in ``cells`` or in cells drawn at random."""
    cells = rng.permutation(CELLS) if cells is None else cells
    return [shape_in_cell(rng, SHAPES[rng.integers(len(SHAPES))], colour, cell, GRID, int(rng.integers(4, 8)))
            for colour, cell in zip(colours, cells)]


def _ask(rng: np.random.Generator, text: str, answer: str, shapes: list[Shape]) -> Question:
    return Question(text, answer, (Media("image", draw_frame(shapes, GRID, draw_background(rng))),))


class ImageTask(ProceduralTask):
    """Questions about one 48 x 48 picture; blind guessing scores about 14 %."""

    domain = "image"
    kinds = {"count": count_shapes, "locate": locate_shape, "compare": compare_sizes}

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple("0123456789") + _COLOURS
