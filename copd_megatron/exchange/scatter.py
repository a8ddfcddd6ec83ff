"""Transport ``scatter``: completions go to the replica that hosts their teacher, signals come back.

Two all-to-alls over the exchange group (same pp, cp, tp coordinate on all replicas): small token ids out on
every stage, signals back between last stages. Within a replica nothing moves, but signals pass the same
codec. A teacher on several replicas serves its students in turns, so that its work is shared.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from copd_megatron.exchange.payload import Codec, Kind, Signal
from copd_megatron.parallel.collectives import all_to_all_ragged
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device

HEADER = 5
"""Integers before a request's tokens: length, teacher, student, prompt, kind."""
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


@dataclass(frozen=True)
class Exchange:
    """One step's requests: what this replica asked, and what it was asked.

    ``open`` it, score ``to_score``, ``close`` it with the signals.
    """

    groups: Groups
    asked: Sequence[ScoreRequest]
    hosts: Sequence[int]
    """Replica that scores each of ``asked``."""
    received: Sequence[Sequence[ScoreRequest]]
    """Requests by asking replica, in their order; this replica's own among them."""

    @classmethod
    def open(cls, asked: Sequence[ScoreRequest], groups: Groups) -> Exchange:
        """Send the requests out. All ranks of the exchange group call it together.

        Raises:
            KeyError: a teacher or student that is no expert.
        """
        here = groups.coords.replica
        hosts = [_host(request, groups) for request in asked]
        if groups.layout.replicas == 1:
            return cls(groups, asked, hosts, [list(asked)])
        experts = groups.placement.experts
        place = {name: index for index, name in enumerate(experts)}
        out: list[list[int]] = [[] for _ in range(groups.layout.replicas)]
        for request, host in zip(asked, hosts):
            if host != here:
                out[host] += [len(request.token_ids), place[request.teacher], place[request.student],
                              request.prompt, KINDS.index(request.kind), *request.token_ids]
        tensors = [torch.tensor(flat, dtype=torch.int64, device=device()) for flat in out]
        received = [_read(flat.tolist(), experts) for flat in all_to_all_ragged(tensors, groups.exchange)]
        received[here] = [request for request, host in zip(asked, hosts) if host == here]
        return cls(groups, asked, hosts, received)

    @property
    def to_score(self) -> list[ScoreRequest]:
        """All requests that this replica must score, its own students' included."""
        return [request for part in self.received for request in part]

    def close(self, signals: Sequence[Signal], codecs: Mapping[Kind, Codec]) -> list[Signal]:
        """Send the signals back; the signals of ``asked``, in order. Last stages call it together.

        Args:
            signals: of ``to_score``, in order.
            codecs: signal kind -> codec; the same kinds on every replica, whatever each of them asked.

        Raises:
            ValueError: not one signal per request, of its kind and length, or a kind without a codec.
        """
        self._check(signals, codecs)
        unread = iter(signals)
        answers = [[next(unread) for _ in part] for part in self.received]
        result: dict[int, Signal] = {}
        for kind in sorted(codecs):
            of_kind = [[signal for signal in part if signal.kind == kind] for part in answers]
            for place, signal in zip(self._places(kind), self._returned(of_kind, kind, codecs[kind])):
                result[place] = signal
        return [result[place] for place in range(len(self.asked))]

    def _places(self, kind: Kind) -> list[int]:
        """Indices into ``asked``, by the replica that scored them: the order in which signals arrive."""
        return [place for replica in range(self.groups.layout.replicas)
                for place, (request, host) in enumerate(zip(self.asked, self.hosts))
                if host == replica and request.kind == kind]

    def _returned(self, answers: Sequence[Sequence[Signal]], kind: Kind, codec: Codec) -> list[Signal]:
        """Trade signals of one kind: ``answers[i]`` goes to replica i, what comes back is as ``_places``."""
        here = self.groups.coords.replica
        own = [codec.round(signal) for signal in answers[here]]
        if len(answers) == 1:
            return own
        out = [codec.pack([] if replica == here else part, device()) for replica, part in enumerate(answers)]
        returned: list[Signal] = []
        for replica, rows in enumerate(all_to_all_ragged(out, self.groups.exchange)):
            lengths = [len(request.token_ids) for request, host in zip(self.asked, self.hosts)
                       if host == replica and request.kind == kind]
            returned += own if replica == here else codec.unpack(rows, lengths)
        return returned

    def _check(self, signals: Sequence[Signal], codecs: Mapping[Kind, Codec]) -> None:
        expected = [(request.kind, len(request.token_ids)) for request in self.to_score]
        given = [(signal.kind, len(signal.logprobs_T)) for signal in signals]
        if given != expected:
            wrong = next((i for i, pair in enumerate(zip(given, expected)) if pair[0] != pair[1]), None)
            detail = "" if wrong is None else f"; number {wrong} is {given[wrong]}, not {expected[wrong]}"
            raise ValueError(f"{len(given)} signals for {len(expected)} requests{detail}")
        uncoded = {request.kind for request in (*self.to_score, *self.asked)} - set(codecs)
        if uncoded:
            raise ValueError(f"no codec for signals of kind {sorted(uncoded)}; there are {sorted(codecs)}")


def _host(request: ScoreRequest, groups: Groups) -> int:
    """This replica if it hosts the teacher, else one of those that do, by prompt."""
    replicas = groups.placement.replicas_of(request.teacher)
    here = groups.coords.replica
    return here if here in replicas else replicas[request.prompt % len(replicas)]


def _read(flat: Sequence[int], experts: Sequence[str]) -> list[ScoreRequest]:
    """Requests from the integers that another replica sent."""
    requests, at = [], 0
    while at < len(flat):
        length, teacher, student, prompt, kind = flat[at:at + HEADER]
        at += HEADER
        requests.append(ScoreRequest(experts[teacher], experts[student], prompt, tuple(flat[at:at + length]),
                                     KINDS[kind]))
        at += length
    return requests
