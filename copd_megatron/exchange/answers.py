"""Signals on their way back to the students, round by round: one travels while the next is being scored.

A round is what one microbatch scored. Before anything is scored each teacher's side tells each student's side
in which round every request will be answered; from then on both know the size of every message, so that a round
is one all-to-all of packed bytes, one message per peer, which nobody waits for. All replicas take part in as
many rounds as the slowest has; messages may be empty.

    result = what ``Exchange.close`` returns, bit for bit, whatever the rounds
"""
from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from copd_megatron.exchange.payload import Codec, Kind, Signal
from copd_megatron.exchange.request import ScoreRequest
from copd_megatron.exchange.wire import Trade, Wire, as_bytes, from_bytes
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device

Key = TypeVar("Key", bound=Hashable)

IN_FLIGHT = 2
"""Rounds on the wire at a time; their buffers are what the overlap costs in memory."""
ROUND_BYTES = torch.int32.itemsize
"""Of the round of one request."""


class _Part(NamedTuple):
    """The stretch of a message that holds all signals of one kind, or what stayed here of it."""

    kind: Kind
    places: list[int]
    """Indices of the requests that they answer."""
    lengths: list[int]


class Answers:
    """Made by ``Exchange.answers``: ``send`` round after round, then ``finish``."""

    def __init__(self, groups: Groups, wire: Wire | None, asked: Sequence[ScoreRequest], hosts: Sequence[int],
                 received: Sequence[Sequence[ScoreRequest]], student_ids: Sequence[Tensor | None],
                 codecs: Mapping[Kind, Codec], round_of: Sequence[int]):
        self.here, self.wire, self.asked = groups.coords.replica, wire, asked
        self.student_ids, self.codecs = student_ids, codecs
        self.requests = [request for part in received for request in part]
        self._check_kinds()
        if len(round_of) != len(self.requests):
            raise ValueError(f"round_of: {len(round_of)} rounds for {len(self.requests)} requests")
        self.rounds = self.own_rounds = max(round_of, default=-1) + 1
        askers = [peer for peer, part in enumerate(received) for _ in part]
        self._in_round = _grouped(round_of)
        """Round -> indices into ``to_score``."""
        self._to_send = _parts(zip(round_of, askers), self.requests)
        """(round, peer that asked) -> what it gets, in indices into ``to_score``."""
        self._to_come = _parts(zip(self._rounds_of_asked(hosts, askers, round_of), hosts), asked)
        """(round, peer that answers) -> what comes, in indices into ``asked``."""
        self._next = 0
        self._flying: deque[tuple[int, Trade]] = deque()
        self._result: dict[int, Signal] = {}

    def send(self, signals: Mapping[int, Signal]) -> None:
        """Hand over the next round: index into ``to_score`` -> signal. Waits at most for the round before the last.

        Raises:
            ValueError: not the requests of this round, or a signal of another kind or length.
        """
        wanted = self._in_round[self._next]
        if signals.keys() != set(wanted):
            raise ValueError(f"signals of requests {sorted(signals)} for round {self._next}, which has {wanted}")
        for index, signal in signals.items():
            self._check(index, signal)
        home = self._next, self.here
        for came, part in zip(self._to_come[home], self._to_send[home], strict=True):
            rounded = self.codecs[part.kind].round([signals[i] for i in part.places])
            self._result |= zip(came.places, rounded, strict=True)
        if self.wire is not None:
            if len(self._flying) == IN_FLIGHT:
                self._land()
            peers = range(self.wire.size)
            out = [[self.codecs[part.kind].pack([signals[i] for i in part.places])
                    for part in self._to_send[self._next, peer] if peer != self.here] for peer in peers]
            sizes = [sum(map(self._size, self._to_come[self._next, peer])) if peer != self.here else 0
                     for peer in peers]
            self._flying.append((self._next, self.wire.trade(out, sizes)))
        self._next += 1

    def finish(self) -> list[Signal]:
        """The signals of ``asked``, in order, after all of this replica's rounds have been sent.

        Raises:
            ValueError: they have not.
        """
        if self._next < self.own_rounds:
            raise ValueError(f"finish after {self._next} of {self.own_rounds} rounds; send them all")
        while self._next < self.rounds:
            self.send({})
        while self._flying:
            self._land()
        return [self._result[place] for place in range(len(self.asked))]

    def _rounds_of_asked(self, hosts: Sequence[int], askers: Sequence[int], round_of: Sequence[int]) -> list[int]:
        """In which round each of ``asked`` is answered; agrees on how many rounds there are."""
        of_peer: dict[int, list[int]] = defaultdict(list)
        for asker, round_ in zip(askers, round_of):
            of_peer[asker].append(round_)
        rounds = {self.here: of_peer[self.here]}
        if self.wire is not None:
            peers = range(self.wire.size)
            out = [[torch.tensor([self.rounds, *of_peer[peer]], dtype=torch.int32, device=device())]
                   if peer != self.here else [] for peer in peers]
            sizes = [ROUND_BYTES * (1 + hosts.count(peer)) if peer != self.here else 0 for peer in peers]
            messages = self.wire.trade([list(map(as_bytes, numbers)) for numbers in out], sizes).wait()
            for peer in peers:
                if peer != self.here:
                    count, *rounds[peer] = from_bytes(messages[peer], torch.int32).tolist()
                    self.rounds = max(self.rounds, count)
        unread = {peer: iter(own) for peer, own in rounds.items()}
        return [next(unread[host]) for host in hosts]

    def _size(self, part: _Part) -> int:
        """Bytes of a part of a message."""
        return sum(part.lengths) * self.codecs[part.kind].bytes_per_token()

    def _land(self) -> None:
        """Wait for the oldest round and decode it."""
        round_, trade = self._flying.popleft()
        for peer, message in enumerate(trade.wait()):
            for part in self._to_come[round_, peer] if peer != self.here else ():
                content, message = message.tensor_split([self._size(part)])
                signals = self.codecs[part.kind].unpack(content, part.lengths)
                self._result |= {i: self._with_ids(i, signal) for i, signal in zip(part.places, signals)}

    def _with_ids(self, place: int, signal: Signal) -> Signal:
        """The signal with the ids that the student asked for, which did not travel twice."""
        return replace(signal, topk_ids_TK=self.student_ids[place]) if signal.kind == "student_topk" else signal

    def _check_kinds(self) -> None:
        kinds = {request.kind for request in (*self.asked, *self.requests)}
        if missing := sorted(kinds - self.codecs.keys()):
            raise ValueError(f"no codec for signals of kind {missing}; there are {sorted(self.codecs)}")

    def _check(self, index: int, signal: Signal) -> None:
        request = self.requests[index]
        wanted, given = (request.kind, len(request.token_ids)), (signal.kind, signal.tokens)
        if given != wanted:
            raise ValueError(f"signal number {index} is {given}, not {wanted}")


def _grouped(keys: Iterable[Key]) -> defaultdict[Key, list[int]]:
    """Key -> places at which it stands, ascending."""
    places = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return places


def _parts(keys: Iterable[tuple[int, int]], requests: Sequence[ScoreRequest]
           ) -> defaultdict[tuple[int, int], list[_Part]]:
    """(round, peer) of each request -> the parts of the message that answers them."""
    parts = defaultdict(list)
    found = _grouped((*key, request.kind) for key, request in zip(keys, requests, strict=True))
    for (round_, peer, kind), places in sorted(found.items()):
        parts[round_, peer].append(_Part(kind, places, [len(requests[i].token_ids) for i in places]))
    return parts
