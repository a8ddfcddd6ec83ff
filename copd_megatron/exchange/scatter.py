"""Transport ``scatter``: completions go to the replica that hosts their teacher, signals come back.

Two all-to-alls over the exchange group (same pp, cp, tp coordinate on all replicas): small token ids out on
every stage, signals back between last stages. Within a replica nothing moves, but signals pass the same codec.
A teacher on several replicas serves its students in turns, so that its work is shared.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from copd_megatron.exchange.payload import Codec, Signal
from copd_megatron.parallel.collectives import all_to_all_ragged
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device

HEADER = 5
"""Integers before a request's tokens: length, teacher, student, prompt, kind."""
KINDS = ("sampled", "topk", "full")


@dataclass(frozen=True)
class ScoreRequest:
    """A completion that a student wants scored. Example: ``ScoreRequest("text", "image", 3, (17, 4, 2))``."""

    teacher: str
    student: str
    prompt: int
    """Place of the prompt in the teacher's native batch of the step."""
    token_ids: tuple[int, ...]
    kind: str = "sampled"


@dataclass(frozen=True)
class Exchange:
    """One step's requests: what this replica asked, and what it was asked."""

    groups: Groups
    asked: Sequence[ScoreRequest]
    hosts: Sequence[int]
    """Replica that scores each of ``asked``."""
    received: Sequence[Sequence[ScoreRequest]]
    """Requests by asking replica, in their order."""

    @classmethod
    def open(cls, asked: Sequence[ScoreRequest], groups: Groups) -> Exchange:
        """Send the requests out. All ranks of the exchange group call it together."""
        hosts = [_host(request, groups) for request in asked]
        if groups.layout.replicas == 1:
            return cls(groups, asked, hosts, [list(asked)])
        experts = groups.placement.experts
        out = []
        for replica in range(groups.layout.replicas):
            flat: list[int] = []
            for request, host in zip(asked, hosts):
                if host == replica:
                    flat += [len(request.token_ids), experts.index(request.teacher), experts.index(request.student),
                             request.prompt, KINDS.index(request.kind), *request.token_ids]
            out.append(torch.tensor(flat, dtype=torch.int64, device=device()))
        received = [_read(t.tolist(), experts) for t in all_to_all_ragged(out, groups.exchange)]
        return cls(groups, asked, hosts, received)

    @property
    def to_score(self) -> list[ScoreRequest]:
        """All requests that this replica must score, its own students' included."""
        return [request for part in self.received for request in part]

    def close(self, signals: Sequence[Signal], codecs: dict[str, Codec]) -> list[Signal]:
        """Send the signals back; the signals of ``asked``, in order. Last stages call it together.

        Args:
            signals: of ``to_score``, in order.
            codecs: signal kind -> codec.
        """
        answers = iter(signals)
        by_asker = [[next(answers) for _ in part] for part in self.received]
        result: list[Signal | None] = [None] * len(self.asked)
        here = self.groups.coords.replica
        for kind, codec in codecs.items():
            out = [codec.pack([s for s, r in zip(answers_, part) if r.kind == kind], device())
                   if replica != here else codec.pack([], device())
                   for replica, (answers_, part) in enumerate(zip(by_asker, self.received))]
            back = all_to_all_ragged(out, self.groups.exchange) if len(out) > 1 else out
            for replica in range(self.groups.layout.replicas):
                places = [i for i, (r, h) in enumerate(zip(self.asked, self.hosts)) if h == replica and r.kind == kind]
                if replica == here:
                    own = [codec.round(s) for s, r in zip(by_asker[here], self.received[here]) if r.kind == kind]
                else:
                    own = codec.unpack(back[replica], [len(self.asked[i].token_ids) for i in places])
                for place, signal in zip(places, own, strict=True):
                    result[place] = signal
        return result


def _host(request: ScoreRequest, groups: Groups) -> int:
    """This replica if it hosts the teacher, else one of those that do, by prompt."""
    replicas = groups.placement.replicas_of(request.teacher)
    here = groups.coords.replica
    return here if here in replicas else replicas[request.prompt % len(replicas)]


def _read(flat: list[int], experts: Sequence[str]) -> list[ScoreRequest]:
    requests, at = [], 0
    while at < len(flat):
        length, teacher, student, prompt, kind = flat[at:at + HEADER]
        at += HEADER
        requests.append(ScoreRequest(experts[teacher], experts[student], prompt, tuple(flat[at:at + length]), KINDS[kind]))
        at += length
    return requests
