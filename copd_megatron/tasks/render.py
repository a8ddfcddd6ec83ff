"""Small pictures for image and video questions, drawn with Pillow on a square grid of cells.

Cells are numbered in reading order. A cell is 16 pixels wide, so that with patches of 8 and a 2 x 2 merge one visual
token covers one cell.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CELL_PIXELS = 16

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40), "green": (40, 200, 60), "blue": (50, 90, 240),
    "yellow": (240, 220, 40), "white": (245, 245, 245), "purple": (170, 60, 210),
}
SHAPES = ("square", "circle", "triangle")


@dataclass(frozen=True)
class Shape:
    """One drawn shape. Example: ``Shape("circle", "red", (8.0, 24.0), 5)`` is in the second cell of the left column."""

    form: str
    colour: str
    centre: tuple[float, float]
    """Pixels from the left and from the top edge."""
    radius: float
    """Half its width in pixels."""


def shape_in_cell(rng: np.random.Generator, form: str, colour: str, cell: int, grid: int, radius: int) -> Shape:
    """A shape near the middle of ``cell`` (0 to grid * grid - 1), moved at random but kept inside it."""
    row, column = divmod(int(cell), grid)
    slack = max(0, CELL_PIXELS // 2 - radius - 1)
    dx, dy = (int(offset) for offset in rng.integers(-slack, slack + 1, size=2))
    centre = ((column + 0.5) * CELL_PIXELS + dx, (row + 0.5) * CELL_PIXELS + dy)
    return Shape(form, colour, centre, radius)


def draw_frame(shapes: Sequence[Shape], grid: int, background: int = 0) -> np.ndarray:
    """[16 * grid, 16 * grid, 3] uint8: the shapes, later ones on top, on a grey level of 0 to 255."""
    side = CELL_PIXELS * grid
    image = Image.new("RGB", (side, side), (background,) * 3)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        x, y = shape.centre
        left, top, right, bottom = x - shape.radius, y - shape.radius, x + shape.radius - 1, y + shape.radius - 1
        fill = COLOURS[shape.colour]
        if shape.form == "square":
            pen.rectangle((left, top, right, bottom), fill=fill)
        elif shape.form == "circle":
            pen.ellipse((left, top, right, bottom), fill=fill)
        elif shape.form == "triangle":
            pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=fill)
        else:
            raise ValueError(f"unknown form {shape.form!r}; known are {SHAPES}")
    return np.array(image)


def draw_background(rng: np.random.Generator) -> int:
    """A dark grey level, so that pictures differ beyond their shapes."""
    return int(rng.integers(0, 48))
