"""The definition of grouped_lora in plain torch: a loop over experts, differentiable by autograd."""
from collections.abc import Sequence

import torch
from torch import Tensor

from copd_kernels.grouped_lora.segments import Segments

Columns = tuple[int, int, int]
"""(first, width, step): row n of a factor B goes to column first + (n // width) * step + n % width."""


def column_index(count: int, columns: Columns, device: torch.device) -> Tensor:
    """[count] int64: the column of every row of B."""
    first, width, step = columns
    n = torch.arange(count, device=device)
    return first + n // width * step + n % width


def check_groups(segments: Segments, factors: Sequence[Tensor]) -> None:
    """Raise ValueError unless there is one factor per expert."""
    if len(segments.routes) != len(factors):
        raise ValueError(f"factors: {len(factors)} for {len(segments.routes)} experts; one each")


def grouped_down(x_TK: Tensor, factors: Sequence[Tensor], segments: Segments) -> Tensor:
    """[T, R] each expert's A x on its rows, 0 elsewhere.

    Args:
        factors: A of each expert, [r_g, K].
        segments: their rows.

    Raises:
        ValueError: not one factor per expert.
    """
    check_groups(segments, factors)
    width = max((a.shape[0] for a in factors), default=0)
    h_TR = x_TK.new_zeros(len(x_TK), width)
    for rows, a in zip(_indices(segments), factors):
        part = x_TK[rows] @ a.to(x_TK.dtype).T
        h_TR = h_TR.index_copy(0, rows, torch.nn.functional.pad(part, (0, width - a.shape[0])))
    return h_TR


def grouped_up(y_TM: Tensor, h_TR: Tensor, factors: Sequence[Tensor], scales: Sequence[float], segments: Segments,
               columns: Columns | None = None) -> Tensor:
    """[T, M] y plus each expert's s B h on its rows.

    Args:
        factors: B of each expert, [N, r_g], the same N for all.
        scales: s of each expert.
        columns: where B's rows go in y; None: N = M, in order.

    Raises:
        ValueError: not one factor per expert.
    """
    check_groups(segments, factors)
    for rows, b, scale in zip(_indices(segments), factors, scales):
        part = (h_TR[rows, :b.shape[1]] * scale) @ b.to(h_TR.dtype).T
        where = column_index(b.shape[0], columns or (0, b.shape[0], 0), y_TM.device)
        y_TM = y_TM.index_put((rows[:, None], where[None]), part, accumulate=True)
    return y_TM


def _indices(segments: Segments) -> list[Tensor]:
    return list(segments.rows.split(segments.lengths)) if segments.routes else []
