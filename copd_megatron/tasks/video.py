"""Video questions over four drawn frames: direction of motion, order of colours, counting over time."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from copd_megatron.tasks.procedural import ProceduralTask, Question
from copd_megatron.tasks.render import (
    CELL_PIXELS,
    COLOURS,
    SHAPES,
    Shape,
    draw_background,
    draw_frame,
    shape_in_cell,
)
from copd_megatron.types import Media

FRAMES = 4
FRAMES_PER_SECOND = 2.0
GRID = 2
CELLS = GRID * GRID
SIDE = GRID * CELL_PIXELS
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
ORDINALS = ("first", "second", "third", "last")
MOST_COUNTED = 2 * FRAMES
_COLOURS = tuple(COLOURS)


def direction_of_motion(rng: np.random.Generator, level: int) -> Question:
    """Where a shape moves; at level 2 another one stands still, at level 3 it moves, too."""
    asked, other, *_ = _shuffled_colours(rng)
    names = list(DIRECTIONS)
    answer, distraction = (names[i] for i in rng.integers(len(names), size=2))
    tracks = [_straight_track(rng, asked, DIRECTIONS[answer])]
    if level > 1:
        tracks.insert(0, _straight_track(rng, other, DIRECTIONS[distraction] if level > 2 else (0, 0)))
    frames = [[track[t] for track in tracks] for t in range(FRAMES)]
    return _ask(rng, f"where does {asked} move?", answer, frames)


def order_of_colours(rng: np.random.Generator, level: int) -> Question:
    """A shape shows four different colours in turn; from level 2 on it also jumps between ``level`` cells."""
    colours = _shuffled_colours(rng)[:FRAMES]
    form = SHAPES[rng.integers(len(SHAPES))]
    cells = rng.permutation(CELLS)[:level]
    asked = int(rng.integers(FRAMES))
    frames = [[shape_in_cell(rng, form, colour, cells[rng.integers(level)], GRID, 6)] for colour in colours]
    return _ask(rng, f"which colour is {ORDINALS[asked]}?", colours[asked], frames)


def count_over_frames(rng: np.random.Generator, level: int) -> Question:
    """How many shapes of one colour appear in all, up to two in a frame, beside up to level - 1 others."""
    asked, *others = _shuffled_colours(rng)
    total = int(rng.integers(0, MOST_COUNTED + 1))
    slots = rng.permutation(MOST_COUNTED)[:total]
    frames = []
    for t in range(FRAMES):
        colours = [asked] * int(np.sum(slots % FRAMES == t))
        colours += [others[i] for i in rng.integers(len(others), size=rng.integers(0, level))]
        frames.append([shape_in_cell(rng, SHAPES[rng.integers(len(SHAPES))], colour, cell, GRID, 6)
                       for colour, cell in zip(colours, rng.permutation(CELLS))])
    return _ask(rng, f"how many {asked} shapes in all?", str(total), frames)


def _shuffled_colours(rng: np.random.Generator) -> list[str]:
    return [_COLOURS[i] for i in rng.permutation(len(_COLOURS))]


def _straight_track(rng: np.random.Generator, colour: str, step: tuple[int, int]) -> list[Shape]:
    """One shape per frame, moving by 4 to 6 pixels a frame and staying inside the picture."""
    radius, speed = 5, int(rng.integers(4, 7))
    travel = speed * (FRAMES - 1)
    start = [int(rng.integers(radius + travel * (way < 0), SIDE - radius - travel * (way > 0) + 1)) for way in step]
    form = SHAPES[rng.integers(len(SHAPES))]
    return [Shape(form, colour, (start[0] + step[0] * speed * t, start[1] + step[1] * speed * t), radius)
            for t in range(FRAMES)]


def _ask(rng: np.random.Generator, text: str, answer: str, frames: Sequence[Sequence[Shape]]) -> Question:
    background = draw_background(rng)
    pixels = np.stack([draw_frame(shapes, GRID, background) for shapes in frames])
    return Question(text, answer, (Media("video", pixels, FRAMES_PER_SECOND),))


class VideoTask(ProceduralTask):
    """Questions about four 32 x 32 frames; blind guessing scores about 18 %."""

    domain = "video"
    kinds = {"direction": direction_of_motion, "order": order_of_colours, "count": count_over_frames}

    @property
    def answers(self) -> tuple[str, ...]:
        return (*DIRECTIONS, *_COLOURS, *(str(count) for count in range(MOST_COUNTED + 1)))
