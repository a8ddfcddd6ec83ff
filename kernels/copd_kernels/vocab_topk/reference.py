"""The definition of vocab_topk in plain torch: ordered by (value descending, id ascending)."""
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CACHE_BYTES = 4 * 2**20
"""What a CPU works on at a time in :func:`row_blocks`."""
NO_ID = -1
"""Id of the places that a shard narrower than k cannot fill; their value is -inf."""


class TopK(NamedTuple):
    """What one read of the rows tells; see the package's contract."""

    values_RK: Tensor
    ids_RK: Tensor
    lse_R: Tensor
    picked_RJ: Tensor | None
    """Logits at the ids asked for; None where none were."""


def check_topk(logits_RV: Tensor, k: int, ids_RJ: Tensor | None) -> None:
    """Raise ValueError for arguments that no implementation takes."""
    if k < 1:
        raise ValueError(f"k: {k}; at least 1")
    if ids_RJ is not None and len(ids_RJ) != len(logits_RV):
        raise ValueError(f"ids_RJ: {len(ids_RJ)} rows of ids for {len(logits_RV)} rows of logits; one each")


def row_blocks(rows_RV: Tensor) -> Iterator[Tensor]:
    """Views of a few rows each, so that on a CPU temporaries stay in the cache; all rows together on CUDA.

    A temporary as large as a chunk's logits costs a CPU its page faults each time, several times the arithmetic.
    """
    size = len(rows_RV) if rows_RV.is_cuda else CACHE_BYTES // (max(1, rows_RV.shape[1]) * rows_RV.itemsize)
    return iter(rows_RV.split(max(1, size)))


def by_rows(function: Callable[[Tensor], Tensor], rows_RV: Tensor) -> Tensor:
    """``function(rows_RV)`` [R], evaluated for blocks of rows."""
    return torch.cat([function(block) for block in row_blocks(rows_RV)])


def row_lse(rows_RV: Tensor) -> Tensor:
    """[R] log-sum-exp of each row."""
    return by_rows(lambda block: block.logsumexp(1), rows_RV)


def pick_logits(logits_RV: Tensor, ids_RJ: Tensor) -> Tensor:
    """[R, J] logits at the ids; 0 where an id lies outside this shard's [0, V)."""
    vocab = logits_RV.shape[1]
    if vocab == 0:
        return logits_RV.new_zeros(ids_RJ.shape)
    inside_RJ = (ids_RJ >= 0) & (ids_RJ < vocab)
    return logits_RV.gather(1, ids_RJ.clamp(0, vocab - 1)).masked_fill_(~inside_RJ, 0)


def _largest_ids(logits_RV: Tensor, k: int) -> Tensor:
    """[R, k] ids of the k largest per row in any order; among equals at the border the lowest ids."""
    values_RK, ids_RK = logits_RV.topk(min(k + 1, logits_RV.shape[1]), dim=1)
    if values_RK.shape[1] == k:
        return ids_RK
    # Where the next one is smaller, there is nothing to choose. To ask a GPU which rows those are is to wait for it.
    border_R = values_RK[:, k - 1]
    if logits_RV.is_cuda:
        return _lowest_ids(logits_RV, border_R, k)
    tied_N = (border_R == values_RK[:, k]).nonzero()[:, 0]
    ids_RK = ids_RK[:, :k]
    if len(tied_N):
        ids_RK = ids_RK.index_copy(0, tied_N, _lowest_ids(logits_RV[tied_N], border_R[tied_N], k))
    return ids_RK


def _lowest_ids(logits_RV: Tensor, border_R: Tensor, k: int) -> Tensor:
    """[R, k] ids of all above the border and, of those at the border, the lowest."""
    vocab, border_R1 = logits_RV.shape[1], border_R[:, None]
    # Ranks without ties: above the border beats at the border, and a lower id beats a higher one.
    rank_V = torch.arange(vocab, 0, -1, dtype=torch.int32, device=logits_RV.device)
    above_RV = (logits_RV > border_R1).to(torch.int32)
    rank_RV = rank_V * (logits_RV >= border_R1) + above_RV.mul_(vocab)
    return rank_RV.topk(k, dim=1).indices


def merge_topk(values_RN: Tensor, ids_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k of N candidates by (value descending, id ascending).

    Args:
        values_RN: [R, N] with N >= k, e.g. the k winners of every shard side by side.
        ids_RN: [R, N] int64, the candidates' ids; ``NO_ID`` comes after all others.

    Returns:
        values [R, k] and ids [R, k].
    """
    order_RN = (ids_RN & torch.iinfo(torch.int64).max).argsort(dim=1)  # without its sign -1 is the largest
    ids_RN, values_RN = ids_RN.gather(1, order_RN), values_RN.gather(1, order_RN)
    values_RN, order_RN = values_RN.sort(dim=1, descending=True, stable=True)
    return values_RN[:, :k].contiguous(), ids_RN.gather(1, order_RN)[:, :k].contiguous()


def vocab_topk(logits_RV: Tensor, k: int, ids_RJ: Tensor | None = None) -> TopK:
    """The k largest logits per row, their ids, the row's log-sum-exp, and the logits at given ids.

    Args:
        logits_RV: [R, V] float32 or float64.
        k: >= 1; columns that do not exist (k > V) come back as -inf with id ``NO_ID``.
        ids_RJ: [R, J] int64 columns to read besides, e.g. the sampled token's; one outside [0, V) gives 0.

    Returns:
        values [R, k] descending, ids [R, k] int64, lse [R], picked [R, J] or None.

    Raises:
        ValueError: k < 1, or another number of rows of ids.
    """
    check_topk(logits_RV, k, ids_RJ)
    rows, vocab = logits_RV.shape
    lse_R = row_lse(logits_RV)
    found = min(k, vocab)
    values_RK = logits_RV.new_full((rows, k), -torch.inf)
    ids_RK = torch.full((rows, k), NO_ID, dtype=torch.int64, device=logits_RV.device)
    if found:
        ids = _largest_ids(logits_RV, found)
        values_RK[:, :found], ids_RK[:, :found] = merge_topk(logits_RV.gather(1, ids), ids, found)
    return TopK(values_RK, ids_RK, lse_R, None if ids_RJ is None else pick_logits(logits_RV, ids_RJ))
