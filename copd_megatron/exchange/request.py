"""What a student asks: a completion to be scored by a teacher; and how requests travel, as int32."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from copd_megatron.exchange.payload import Kind

HEADER = 5
"""Integers before a request's tokens: length, teacher, student, prompt, kind."""
ID_BYTES = 4
"""Of each integer."""
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ScoreRequest:
    """A completion that a student wants scored. Example: ``ScoreRequest("text", "image", 3, (17, 4, 2))``."""

    teacher: str
    student: str
    prompt: int
    """Place of the prompt in the teacher's native batch of the step."""
    token_ids: tuple[int, ...]
    kind: Kind = "sampled"


def write_requests(requests: Iterable[ScoreRequest], experts: Sequence[str]) -> Tensor:
    """The requests as a row of int32; KeyError for a teacher or student that is no expert."""
    place = {name: index for index, name in enumerate(experts)}
    numbers: list[int] = []
    for r in requests:
        numbers += len(r.token_ids), place[r.teacher], place[r.student], r.prompt, KINDS.index(r.kind)
        numbers += r.token_ids
    return torch.from_numpy(np.array(numbers, dtype=np.int32))  # five times as fast as torch.tensor


def read_requests(numbers: Tensor, experts: Sequence[str]) -> list[ScoreRequest]:
    """Inverse of ``write_requests``."""
    flat, requests, at = numbers.tolist(), [], 0
    while at < len(flat):
        length, teacher, student, prompt, kind = flat[at:at + HEADER]
        at += HEADER
        requests.append(ScoreRequest(experts[teacher], experts[student], prompt, tuple(flat[at:at + length]),
                                     KINDS[kind]))
        at += length
    return requests
