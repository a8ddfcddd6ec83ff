"""Transport ``scatter``: completions go to the replica that hosts their teacher, signals come back.

All-to-alls over the exchange group (same pp, cp, tp coordinate on all replicas): small token ids out on every
stage, signals back between last stages, ``exchange.answers``. Within a replica nothing moves, but signals pass
the same codec. A teacher on several replicas serves its students in turns, so that its work is shared.

With transport ``gather_adapters`` every request stays at home: the adapters have come instead
(``exchange.gather``).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from copd_megatron.exchange.answers import Answers
from copd_megatron.exchange.payload import Codec, Kind, Signal
from copd_megatron.exchange.request import ID_BYTES, ScoreRequest, read_requests, write_requests
from copd_megatron.exchange.wire import Wire, as_bytes, from_bytes
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device


@dataclass(frozen=True)
class Exchange:
    """One step's requests: what this replica asked, and what it was asked.

    ``open`` it; on last stages score ``to_score`` and ``close`` it with the signals, or hand them over round by
    round (``answers``).
    """

    groups: Groups
    asked: Sequence[ScoreRequest]
    hosts: Sequence[int]
    """Replica that scores each of ``asked``."""
    received: Sequence[Sequence[ScoreRequest]]
    """Requests by asking replica, in their order; this replica's own among them."""
    wire: Wire | None = None
    """None where nothing crosses: one replica, or all teachers at home."""
    student_ids: Sequence[Tensor | None] = ()
    """[T, K] ids of each of ``asked`` at which the teacher shall answer; kind ``student_topk``, see ``tell_ids``."""

    @classmethod
    def open(cls, asked: Sequence[ScoreRequest], groups: Groups, at_home: bool = False,
             checked: bool = False) -> Exchange:
        """Send the requests out. All ranks of the exchange group call it together.

        Args:
            at_home: every teacher's adapters are on this replica; nothing is sent, now or later.
            checked: a checksum with every message (``parallel.debug_checks``).

        Raises:
            KeyError: a teacher or student that is no expert.
        """
        here = groups.coords.replica
        hosts = [here if at_home else host_of(request, groups) for request in asked]
        student_ids = [None] * len(asked)
        if at_home or groups.layout.replicas == 1:
            received = [list(asked) if replica == here else [] for replica in range(groups.layout.replicas)]
            return cls(groups, asked, hosts, received, student_ids=student_ids)
        wire = Wire(groups.exchange, checked)
        experts = groups.placement.experts
        by_host: list[list[ScoreRequest]] = [[] for _ in range(groups.layout.replicas)]
        for request, host in zip(asked, hosts):
            by_host[host].append(request)
        home, by_host[here] = by_host[here], []
        out = [[as_bytes(write_requests(part, experts).to(device()))] if part else [] for part in by_host]
        received = [read_requests(from_bytes(message, torch.int32), experts) for message in wire.trade_ragged(out)]
        received[here] = home
        return cls(groups, asked, hosts, received, wire, student_ids)

    @property
    def to_score(self) -> list[ScoreRequest]:
        """All requests that this replica must score, its own students' included."""
        return [request for part in self.received for request in part]

    def tell_ids(self, student_ids: Sequence[Tensor | None], k: int) -> tuple[Exchange, list[Tensor | None]]:
        """Send the students' ids after the requests. Last stages call it together.

        Args:
            student_ids: [T, k] int64 for each of ``asked`` of kind ``student_topk``, None for others.

        Returns:
            The exchange that knows them, and for each of ``to_score`` the ids at which it is asked, or None.

        Raises:
            ValueError: ids of another shape, missing, or for another kind.
        """
        for request, ids in zip(self.asked, student_ids, strict=True):
            given = None if ids is None else tuple(ids.shape)
            wanted = (len(request.token_ids), k) if request.kind == "student_topk" else None
            if given != wanted:
                raise ValueError(f"student_ids: {given} for a request of kind {request.kind} and "
                                 f"{len(request.token_ids)} tokens; {wanted}")
        here = self.groups.coords.replica
        told = [[ids for ids, host in zip(student_ids, self.hosts) if host == replica]
                for replica in range(len(self.received))]
        if self.wire is not None:
            leaving = [[ids for ids in part if ids is not None and replica != here]
                       for replica, part in enumerate(told)]
            out = [[as_bytes(torch.cat(part).int())] if part else [] for part in leaving]
            sizes = [_id_bytes(part, k) if replica != here else 0 for replica, part in enumerate(self.received)]
            messages = self.wire.trade(out, sizes).wait()
            told = [told[here] if replica == here else _split_ids(message, self.received[replica], k)
                    for replica, message in enumerate(messages)]
        return replace(self, student_ids=list(student_ids)), [ids for part in told for ids in part]

    def answers(self, codecs: Mapping[Kind, Codec], round_of: Sequence[int]) -> Answers:
        """The way back, in rounds; last stages call it together.

        Args:
            codecs: signal kind -> codec; the same kinds on every replica, whatever each of them asked.
            round_of: the round, from 0, in which each of ``to_score`` will have been scored.
        """
        return Answers(self.groups, self.wire, self.asked, self.hosts, self.received, self.student_ids, codecs,
                       round_of)

    def close(self, signals: Sequence[Signal], codecs: Mapping[Kind, Codec]) -> list[Signal]:
        """Send all signals back at once, and wait; the signals of ``asked``, in order. The plain way.

        Args:
            signals: of ``to_score``, in order.
            codecs: as in ``answers``.

        Raises:
            ValueError: not one signal per request, of its kind and length, or a kind without a codec.
        """
        requests = self.to_score
        if len(signals) != len(requests):
            raise ValueError(f"{len(signals)} signals for {len(requests)} requests")
        answers = self.answers(codecs, [0] * len(requests))
        answers.send(dict(enumerate(signals)))
        return answers.finish()


def host_of(request: ScoreRequest, groups: Groups) -> int:
    """This replica if it hosts the teacher, else one of those that do, by prompt."""
    replicas = groups.placement.replicas_of(request.teacher)
    here = groups.coords.replica
    return here if here in replicas else replicas[request.prompt % len(replicas)]


def _id_bytes(requests: Sequence[ScoreRequest], k: int) -> int:
    """Bytes of the students' ids that come with these requests."""
    return sum(ID_BYTES * k * len(request.token_ids) for request in requests if request.kind == "student_topk")


def _split_ids(message: Tensor, requests: Sequence[ScoreRequest], k: int) -> list[Tensor | None]:
    """[T, k] int64 of each request of kind ``student_topk``, None for others."""
    lengths = [len(r.token_ids) for r in requests if r.kind == "student_topk"]
    parts = iter(from_bytes(message, torch.int32).view(-1, k).long().split(lengths) if lengths else ())
    return [next(parts) if request.kind == "student_topk" else None for request in requests]
