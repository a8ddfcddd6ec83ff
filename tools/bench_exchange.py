"""Times the exchange of one OPD step between gloo ranks and counts its bytes, for 2 to 32 experts.

Every row is one step: students on `ranks` replicas ask, teachers answer with a signal (`scatter`), or the teachers'
adapters travel (`gather_adapters`). Beside it, with the same signals for the same students:

    full_vocab_bytes_per_token   what the teacher's logits over the vocabulary would take, in the wire's dtype
    gather_object_s              gather_object of Python lists to each rank in turn (what RPC stacks do)
    all_gather_s                 all_gather of dense int64 and float32 tensors, padded to the longest completion

    python tools/bench_exchange.py --json exchange.json
    python tools/bench_exchange.py --experts 4 8 --topologies full --per edge

Timed is the same work on all sides, from requests on the student's rank and the teacher's scores on its own to
tensors on the student's, requests and the mass outside the top-k included; scoring is not. Bytes are counted at
the collective, checksums and control words included, over all ranks, and divided by the tokens that were scored on
another rank than their student's. What arrives in a timed run is decoded and compared with a dense log-softmax and
top-k over the whole vocabulary. Ways take turns; the slowest rank counts, and of `--repeats` runs the fastest, since
other load only adds time. `gather_object`, which is slow, runs twice.
"""
from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import bench_record
import exchange_baselines
from exchange_world import World, factor_of, make_bank
from forked_ranks import fork_ranks

import copd_megatron.platform  # noqa: F401  (before any of Megatron)
from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.exchange.gather import gathered_teachers
from copd_megatron.exchange.payload import WIRE, Codec, Signal
from copd_megatron.exchange.request import KINDS, ScoreRequest
from copd_megatron.exchange.scatter import Exchange
from copd_megatron.exchange.topology import TOPOLOGIES, edges
from copd_megatron.exchange.transport import adapter_bytes
from copd_megatron.exchange.wire import Wire
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import Edge

LENGTHS = (32, 512)
"""Shortest and longest completion, but for an edge's last one."""
FULL_SHARE = 16
"""Of the tokens, signal `full` takes one in so many: the lists made of hidden states do not fit beside each other."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 2**-7}
"""Absolute and relative, of log-probs and hidden states; float32 sums over 152k ids differ by 3e-5."""


@dataclass(frozen=True)
class Case:
    """One step's settings."""

    experts: int
    topology: str
    signal: str
    adapters: bool
    """Also by transport `gather_adapters`."""


class Step:
    """One rank's part of one OPD step."""

    def __init__(self, case: Case, groups: Groups, world: World, options: argparse.Namespace):
        self.case, self.groups, self.world, self.options = case, groups, world, options
        names = groups.placement.experts
        self.edges = edges(ExchangeConfig(topology=case.topology), OpdConfig(signal=case.signal), names, 0, _no_names)
        self.asked = [r for edge in self.edges if edge.student in groups.hosted for r in self._requests(edge)]
        self.codecs = {case.signal: Codec(case.signal, options.wire_dtype, options.topk, options.hidden)}
        self.ids = [world.student_ids(request) for request in self.asked]
        self.exchange = self._open()
        self.told = [[world.signal(request) for request in part] for part in self.exchange.received]
        self.tokens = sum(len(r.token_ids) for r, host in zip(self.asked, self.exchange.hosts)
                          if host != groups.coords.replica)

    def scatter(self) -> tuple[float, int]:
        """Seconds and bytes of requests out and signals back."""
        start = _together()
        exchange = self._open()
        returned = exchange.close([signal for part in self.told for signal in part], self.codecs)
        seconds = time.perf_counter() - start
        self._check(returned, TOLERANCE[self.options.wire_dtype])
        return seconds, exchange.wire.sent_bytes

    def gather_adapters(self, bank: AdapterBank) -> tuple[float, int]:
        """Seconds and bytes until this replica holds its students' teachers."""
        wire, start = Wire(self.groups.exchange), _together()
        with gathered_teachers(bank, self.groups, self.edges, wire):
            seconds = time.perf_counter() - start
            for expert in bank.slots:
                for name, parameter in bank.parameters_of(expert).items():
                    if not torch.equal(parameter, factor_of(expert, tuple(parameter.shape))):
                        raise ArithmeticError(f"{expert} {name}: other factors than the teacher's arrived")
        return seconds, wire.sent_bytes

    def baseline(self, way: Callable[..., list[Signal]]) -> float:
        """Seconds of one of `exchange_baselines`."""
        start = _together()
        returned = way(list(zip(self.asked, self.ids, self.exchange.hosts)), self.told, self.groups.coords.replica)
        seconds = time.perf_counter() - start
        self._check(returned, TOLERANCE["float32"])
        return seconds

    def _open(self) -> Exchange:
        exchange = Exchange.open(self.asked, self.groups)
        if self.case.signal == "student_topk":
            exchange, _ = exchange.tell_ids(self.ids, self.options.topk)
        return exchange

    def _requests(self, edge: Edge) -> Iterator[ScoreRequest]:
        """Completions of an edge that this replica asks about, ragged, about its share of the tokens."""
        incoming = sum(other.student == edge.student for other in self.edges)
        tokens = self.options.tokens // (FULL_SHARE if edge.signal == "full" else 1)
        wanted = tokens if self.options.per == "edge" else max(1, tokens // incoming)
        generator = torch.Generator().manual_seed(1000 * int(edge.teacher[1:]) + int(edge.student[1:]))
        prompt = 0
        while wanted > 0:
            length = min(wanted, int(torch.randint(LENGTHS[0], LENGTHS[1] + 1, (1,), generator=generator)))
            ids = torch.randint(2**17, (length,), generator=generator).tolist()
            yield ScoreRequest(edge.teacher, edge.student, prompt, tuple(ids), edge.signal)
            wanted, prompt = wanted - length, prompt + 1

    def _check(self, signals: Sequence[Signal], tolerance: float) -> None:
        for request, signal in zip(self.asked, signals, strict=True):
            self.world.check(request, signal, tolerance)


def _together() -> float:
    """All ranks start the clock at once."""
    dist.barrier()
    return time.perf_counter()


def _no_names(reference: str, field: str) -> None:
    raise ValueError(f"{field}: {reference}; only built-in topologies are measured")


def measure(case: Case, groups: Groups, world: World, bank: AdapterBank, options: argparse.Namespace) -> list[dict]:
    """A row for each transport, the same on every rank; the baselines' times stand in both."""
    step = Step(case, groups, world, options)
    ways = {"gather_object_s": exchange_baselines.gather_object, "all_gather_s": exchange_baselines.all_gather}
    ours: dict[str, Callable[[], tuple[float, int]]] = {"scatter": step.scatter}
    if case.adapters:
        ours["gather_adapters"] = lambda: step.gather_adapters(bank)
    times: dict[str, list[float]] = {name: [] for name in (*ways, *ours)}
    sent: dict[str, int] = {}
    for repeat in range(options.repeats + 1):
        took = {name: step.baseline(way) for name, way in ways.items() if repeat < 2 or name != "gather_object_s"}
        for name, way in ours.items():
            took[name], sent[name] = way()
        for name, value in took.items():
            times[name].append(_over_ranks(value, dist.ReduceOp.MAX))
    tokens = int(_over_ranks(step.tokens, dist.ReduceOp.SUM))
    baselines = {name: min(times[name]) for name in ways}
    rows = []
    for name in ours:
        step_bytes = int(_over_ranks(sent[name], dist.ReduceOp.SUM))
        rows.append({
            "experts": case.experts, "topology": case.topology, "transport": name, "signal": case.signal,
            "ranks": groups.layout.replicas, "edges": len(step.edges), "crossing_tokens": tokens,
            "bytes_per_token": step_bytes / tokens, "step_bytes": step_bytes,
            "seconds": min(times[name]), **baselines,
            "full_vocab_bytes_per_token": options.vocabulary * WIRE[options.wire_dtype].itemsize,
            "adapter_bytes": adapter_bytes(bank)})
    return rows


def _over_ranks(value: float, op: dist.ReduceOp) -> float:
    box = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(box, op)
    return float(box)


def cases(experts: int, options: argparse.Namespace) -> Iterator[Case]:
    """Top-k by both transports on every topology; the other signals on the first."""
    for topology in options.topologies:
        yield Case(experts, topology, "topk", adapters=True)
    for signal in options.signals:
        if signal != "topk":
            yield Case(experts, options.topologies[0], signal, adapters=False)


def run_rank(experts: int, world: World, options: argparse.Namespace, where: dict, earlier: Sequence[dict]
             ) -> list[dict]:
    """Body of one rank: the rows of so many experts, saved behind ``earlier`` ones as they come."""
    ranks, rows = dist.get_world_size(), []
    groups = Groups.create(Layout(replicas=ranks), Placement.build([f"e{n}" for n in range(experts)], ranks))
    bank = make_bank(groups, options.adapter_layers, options.rank)
    for case in cases(experts, options):
        if dist.get_rank() == 0:
            print(f"measuring {experts} experts, {case.topology}, {case.signal} ...", file=sys.stderr, flush=True)
        found = measure(case, groups, world, bank, options)
        rows += found
        if dist.get_rank() == 0:
            show(found)
            save([*earlier, *rows], where, options)
    return rows


def save(rows: Sequence[dict], where: dict, options: argparse.Namespace) -> None:
    """Write all rows so far to `--json`, in place of what is there."""
    exponents = [{"topology": t, "transport": w, "exponent": p} for t, w, p in growth(rows)]
    bench_record.save_json(options.json, {"rows": rows, "exponents": exponents}, where, options)


HEADINGS = (f"{'experts':>7}{'topology':>10} {'transport':<16}{'signal':<14}{'bytes/token':>11}{'full vocab /':>13}"
            f"{'step MB':>9}{'seconds':>9}{'object /':>9}{'gather /':>9}")


def show(rows: Sequence[dict]) -> None:
    """Lines of the table; the ratios say how many times more the alternatives take."""
    for row in rows:
        print(f"{row['experts']:>7}{row['topology']:>10} {row['transport']:<16}{row['signal']:<14}"
              f"{row['bytes_per_token']:>11.1f}{row['full_vocab_bytes_per_token'] / row['bytes_per_token']:>13.0f}"
              f"{row['step_bytes'] / 1e6:>9.2f}{row['seconds']:>9.4f}{row['gather_object_s'] / row['seconds']:>9.1f}"
              f"{row['all_gather_s'] / row['seconds']:>9.1f}", flush=True)


def worst(rows: Sequence[dict]) -> str:
    """The least that `scatter` gains with signal topk."""
    own = [row for row in rows if (row["transport"], row["signal"]) == ("scatter", "topk")]
    if not own:
        return "no rows of scatter with signal topk"
    ratios = {"full-vocabulary logits": lambda r: r["full_vocab_bytes_per_token"] / r["bytes_per_token"],
              "gather_object": lambda r: r["gather_object_s"] / r["seconds"],
              "all_gather": lambda r: r["all_gather_s"] / r["seconds"]}
    least = {name: min(own, key=ratio) for name, ratio in ratios.items()}
    return "scatter, topk, at least: " + ", ".join(
        f"{ratios[name](row):.1f}x less than {name} ({row['experts']} experts, {row['topology']})"
        for name, row in least.items())


def growth(rows: Sequence[dict]) -> Iterator[tuple[str, str, float]]:
    """(topology, transport, p) of step_bytes ~ experts^p, least squares on logarithms, signal topk.

    Only rows with the same number of ranks: experts that share one exchange nothing.
    """
    most = max((row["ranks"] for row in rows), default=0)
    kept = [r for r in rows if r["signal"] == "topk" and r["ranks"] == most and r["step_bytes"]]
    for topology, transport in dict.fromkeys((r["topology"], r["transport"]) for r in kept):
        points = [(math.log(r["experts"]), math.log(r["step_bytes"])) for r in kept
                  if (r["topology"], r["transport"]) == (topology, transport)]
        if len(points) > 1:
            yield topology, transport, statistics.linear_regression(*zip(*points)).slope


def machine() -> dict:
    """Where this runs."""
    return bench_record.machine() | {
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "backend": "gloo"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; defaults are sized for two CPU cores and 20 GB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32], metavar="N",
                        help="numbers of experts (2 4 8 16 32)")
    parser.add_argument("--topologies", nargs="+", default=["hub", "full", "ring"], metavar="NAME",
                        choices=[name for name in TOPOLOGIES if name != "none"],
                        help="as exchange.topology (hub full ring)")
    parser.add_argument("--signals", nargs="+", default=list(KINDS), choices=KINDS, metavar="NAME",
                        help=f"as opd.signal ({' '.join(KINDS)})")
    parser.add_argument("--per", choices=("student", "edge"), default="student",
                        help="what --tokens are fixed for: cross tokens of a student, or of an edge (%(default)s)")
    parser.add_argument("--wire-dtype", choices=tuple(WIRE), default="bfloat16",
                        help="opd.wire_dtype (%(default)s)")
    for name, default, text in (
            ("ranks", 4, "replicas; more experts than that live together"),
            ("tokens", 8192, f"cross tokens, see --per; one in {FULL_SHARE} for signal full"),
            ("vocabulary", 151936, "ids of the vocabulary"), ("topk", 64, "ids per token"),
            ("hidden", 2560, "hidden size, of signal full"), ("rank", 32, "rank of the adapters"),
            ("adapter-layers", 1, "layers with adapters, as wide as a 4B model's"),
            ("repeats", 5, "runs after the first, which warms up")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    bench_record.add_json_option(parser, "write the results there, row after row")
    options = parser.parse_args(arguments)
    bench_record.refuse_below(parser, options, ranks=1, tokens=1, vocabulary=1, topk=1, hidden=1, rank=1,
                              adapter_layers=1, repeats=1)
    if options.topk > options.vocabulary:
        parser.error(f"--topk: {options.topk}; at most the vocabulary's {options.vocabulary}")
    if min(options.experts) < 2 or options.ranks < 2:
        parser.error("--experts, --ranks: at least 2, or nothing is exchanged")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0; 1 when what arrived is not what was sent."""
    options, where, rows = parse(arguments), machine(), []
    print(f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f}, gloo, torch {where['torch']}; "
          f"{options.tokens} tokens per {options.per}, top-{options.topk} of {options.vocabulary}, wire "
          f"{options.wire_dtype}\n{HEADINGS}", flush=True)
    torch.set_num_threads(1)  # children are forked: the parent must own no other threads
    world = World.draw(options.vocabulary, options.topk, options.hidden)
    try:
        for experts in options.experts:
            rows += fork_ranks(min(experts, options.ranks), run_rank, experts, world, options, where, rows)
    except ArithmeticError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(worst(rows))
    for topology, transport, power in growth(rows):
        print(f"{topology}, {transport}: bytes grow as experts^{power:.2f}")
    return 0


if __name__ == "__main__":
    bench_record.end(main)
