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


def check_down(x_TK: Tensor, factors: Sequence[Tensor], segments: Segments) -> None:
    """Raise ValueError for what ``grouped_down`` takes in no form."""
    _check(len(x_TK), factors, segments)
    if any(a.shape[1] != x_TK.shape[1] for a in factors):
        raise ValueError(f"factors: {[tuple(a.shape) for a in factors]} for rows of {x_TK.shape[1]}; A is [r, K]")


def check_up(y_TM: Tensor, h_TR: Tensor, factors: Sequence[Tensor], segments: Segments,
             columns: Columns | None) -> None:
    """Raise ValueError for what ``grouped_up`` takes in no form."""
    _check(min(len(y_TM), len(h_TR)), factors, segments)
    if not factors:
        return
    count = factors[0].shape[0]
    first, width, step = columns or (0, count, 0)
    last = first + (count - 1) // width * step + min(count, width)
    fits = last <= y_TM.shape[1] and (columns is not None or count == y_TM.shape[1])
    if not fits or step < width < count or any(b.shape[0] != count or b.shape[1] > h_TR.shape[1] for b in factors):
        raise ValueError(f"factors: {[tuple(b.shape) for b in factors]} for h of {h_TR.shape[1]} and y of "
                         f"{y_TM.shape[1]} columns, at {columns}; B is [N, r], its rows each in a column of y")


def _check(tokens: int, factors: Sequence[Tensor], segments: Segments) -> None:
    if len(segments.routes) != len(factors):
        raise ValueError(f"factors: {len(factors)} for {len(segments.routes)} experts; one each")
    end = max((rows.stop for rows in segments.routes if isinstance(rows, slice)), default=0)
    if end > tokens:
        raise ValueError(f"segments: rows up to {end} of a stream of {tokens}; inside the stream")


def grouped_down(x_TK: Tensor, factors: Sequence[Tensor], segments: Segments) -> Tensor:
    """[T, R] each expert's A x on its rows, 0 elsewhere.

    Args:
        factors: A of each expert, [r_g, K].
        segments: their rows.

    Raises:
        ValueError: not one factor per expert, or shapes that do not fit.
    """
    check_down(x_TK, factors, segments)
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
        ValueError: not one factor per expert, or shapes that do not fit.
    """
    check_up(y_TM, h_TR, factors, segments, columns)
    for rows, b, scale in zip(_indices(segments), factors, scales):
        part = (h_TR[rows, :b.shape[1]] * scale) @ b.to(h_TR.dtype).T
        where = column_index(b.shape[0], columns or (0, b.shape[0], 0), y_TM.device)
        y_TM = y_TM.index_put((rows[:, None], where[None]), part, accumulate=True)
    return y_TM


def _indices(segments: Segments) -> list[Tensor]:
    return list(segments.rows.split(segments.lengths)) if segments.routes else []
