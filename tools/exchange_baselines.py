"""How requests and signals would travel without `copd_megatron.exchange`; `bench_exchange.py` times it.

Both do the whole of the work: requests (with the student's ids, for signal `student_topk`) reach the rank that hosts
their teacher, and the students' ranks end up with tensors, the mass outside the top-k included.

Shape suffixes: T completion tokens, K top-k ids, N requests of a rank.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.exchange.payload import Signal
from copd_megatron.exchange.request import ScoreRequest
from copd_megatron.losses.topk_kl import log_tail

Asked = Sequence[tuple[ScoreRequest, Tensor | None, int]]
"""A rank's requests, with the ids [T, K] that the student asks about, if it does, and the rank of the teacher."""


def gather_object(asked: Asked, told: Sequence[Sequence[Signal]], here: int) -> list[Signal]:
    """Python lists, by `gather_object` to each rank in turn; what stays on its rank is not made into lists.

    Args:
        told: what this rank's teachers say, by asking rank, in the order of its requests.

    Returns:
        Signals of ``asked``, in order.
    """
    _to_each(len(told), here, lambda to: [
        [r.teacher, r.student, r.prompt, r.kind, list(r.token_ids), None if ids is None else ids.tolist()]
        for r, ids, host in asked if host == to])
    answers = _to_each(len(told), here, lambda to: [[c.tolist() for c in columns_of(s)] for s in told[to]])
    unread = [iter([list(map(torch.tensor, lists)) for lists in part]) for part in answers]
    unread[here] = map(columns_of, told[here])
    return [signal_of(r, next(unread[host]), ids) for r, ids, host in asked]


def all_gather(asked: Asked, told: Sequence[Sequence[Signal]], here: int) -> list[Signal]:
    """Dense tensors of int64 and float32, as PyTorch makes them, padded to the longest completion and gathered by
    everyone. Arguments and result as above."""
    rows = [torch.tensor([host, len(r.token_ids), int(r.teacher[1:]), int(r.student[1:]), r.prompt, *r.token_ids])
            for r, _, host in asked]
    shape = torch.tensor([len(rows), max(map(len, rows), default=5)])
    dist.all_reduce(shape, dist.ReduceOp.MAX)
    requests_RNT = _everyones(rows, shape.tolist(), torch.empty(0, dtype=torch.int64))
    if asked[0][0].kind == "student_topk":
        _everyones([ids for _, ids, _ in asked], [int(shape[0]), int(shape[1]) - 5], asked[0][1])
    hosts_RN = requests_RNT[:, :, 0].masked_fill(requests_RNT[:, :, 1] == 0, -1)
    counts = torch.stack([(hosts_RN == host).sum(1) for host in range(len(told))])  # [teachers' rank, students' rank]
    own = [columns_of(signal) for signals in told for signal in signals]
    answers = [_everyones(column, [int(counts.sum(1).max()), int(shape[1]) - 5], column[0]) for column in zip(*own)]
    unread = [_rows(answers, host, int(counts[host, :here].sum())) for host in range(len(told))]
    returned = [(r, [c[:len(r.token_ids)] for c in next(unread[host])], ids) for r, ids, host in asked]
    return [signal_of(*some) for some in returned]


def columns_of(signal: Signal) -> list[Tensor]:
    """The tensors of a signal that somebody has to bring; a student knows the ids that it asked about."""
    ids = signal.topk_ids_TK if signal.kind == "topk" else None
    return [c for c in (signal.logprobs_T, ids, signal.topk_logprobs_TK, signal.hidden_TH) if c is not None]


def signal_of(request: ScoreRequest, columns: Sequence[Tensor], ids: Tensor | None) -> Signal:
    """Inverse of `columns_of`."""
    if request.kind == "full":
        return Signal("full", hidden_TH=columns[0])
    own_T, *others = columns
    if request.kind in ("topk", "student_topk"):
        ids_TK, head_TK = others if request.kind == "topk" else (ids, *others)
        return Signal(request.kind, own_T, ids_TK, head_TK, log_tail(head_TK))
    return Signal("sampled", own_T)


def _to_each(ranks: int, here: int, lists_for: Callable[[int], list]) -> list[list[Any]]:
    """What the others made for this rank, by rank."""
    mine: list[list[Any]] = []
    for to in range(ranks):
        boxes = [None] * ranks if to == here else None
        dist.gather_object(lists_for(to) if to != here else [], boxes, dst=to)
        mine = boxes or mine
    return mine


def _everyones(rows: Sequence[Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    """[ranks, *shape, ...] rows of all ranks, padded with zeros."""
    own = like.new_zeros(*shape, *like.shape[1:])
    for place, row in enumerate(rows):
        own[place, :len(row)] = row
    gathered = own.new_empty(dist.get_world_size() * shape[0], *own.shape[1:])
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(gathered, own)  # renamed in torch 2.13
    return gathered.view(-1, *own.shape)


def _rows(columns: Sequence[Tensor], host: int, first: int) -> Iterator[list[Tensor]]:
    """A host's answers from its first on."""
    return ([column[host, row] for column in columns] for row in range(first, columns[0].shape[1]))
