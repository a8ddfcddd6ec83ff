"""Numbers of one step from all ranks: sums with weights, and samples of values for percentiles."""
from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from copd_megatron.exchange.schedule import Measured
from copd_megatron.metrics.names import edge_name, pair_name
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.placement import Placement
from copd_megatron.trainer.batching import Sample

Sums = dict[str, tuple[Tensor | float, float]]
"""Metric name -> (sum, weight); the metric is the ratio of both, added up over microbatches and ranks. A weight
of 0 marks a plain sum."""

VALUES_PER_EDGE = 4096
"""Deltas each replica contributes to an edge's percentiles."""
BUSY_PHASES = ("rollout", "score", "update")
"""Parts of a step in which a replica works on its own experts."""
PERCENTILES = {"delta_p05": 5, "delta_p50": 50, "delta_p95": 95}


def add_sums(sums: Sums, more: Mapping[str, tuple[Tensor | float, float]]) -> None:
    """Add ``more`` to ``sums`` in place."""
    for name, (value, weight) in more.items():
        old, total = sums.get(name, (0.0, 0.0))
        sums[name] = (old + value, total + weight)


class StepMetrics:
    """Collects sums on every rank; one rank per replica speaks for it."""

    def __init__(self, groups: Groups):
        self.groups = groups
        self._sums: Sums = {}
        self._values: dict[str, np.ndarray] = {}
        self._busy: dict[str, float] = {}

    @property
    def speaks(self) -> bool:
        """Whether this rank has its replica's numbers: last stage, first TP rank."""
        return self.groups.is_last_stage and self.groups.coords.tp == 0 and self.groups.coords.cp == 0

    def add(self, sums: Mapping[str, tuple[Tensor | float, float]]) -> None:
        """Add sums and weights."""
        add_sums(self._sums, sums)

    def add_busy(self, seconds: Mapping[str, float]) -> None:
        """Part of the step -> seconds that this replica was at work in it."""
        self._busy.update(seconds)

    def add_deltas(self, samples: Sequence[Sample]) -> None:
        """Remember the deltas of cross samples, which are on the host, for percentiles."""
        by_edge: dict[str, list[Tensor]] = defaultdict(list)
        for sample in samples:
            if sample.delta is not None:
                by_edge[edge_name(sample.edge.teacher, sample.edge.student, "")].append(sample.delta)
        for name, parts in by_edge.items():
            values = torch.cat(parts).float().numpy()
            stride = max(1, len(values) // VALUES_PER_EDGE)
            self._values[name] = values[::stride]

    def reduce(self) -> dict[str, float]:
        """The step's metrics over all replicas, the same on every rank."""
        spoken = (_on_host(self._sums), self._values) if self.speaks else ({}, {})
        totals: Sums = {}
        values: dict[str, list[np.ndarray]] = defaultdict(list)
        peaks, busy = [], {}
        speaker = self.groups.coords.replica if self.speaks else None
        mine = (spoken, _peak_bytes(), speaker, self._busy)
        for (sums, arrays), peak, replica, seconds in all_gather_objects(mine, self.groups.world):
            add_sums(totals, sums)
            for name, array in arrays.items():
                values[name].append(array)
            peaks.append(peak)
            if replica is not None:
                busy[replica] = seconds
        metrics = {name: value / weight if weight else value for name, (value, weight) in totals.items()}
        metrics["memory/peak_bytes"] = float(max(peaks))
        metrics |= idle_shares(self.groups.placement, busy)
        for name, arrays in values.items():
            joined = np.concatenate(arrays)
            if len(joined):
                metrics |= {name + what: float(np.percentile(joined, q)) for what, q in PERCENTILES.items()}
        return metrics


def idle_shares(placement: Placement, busy: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """``{expert}/idle/{phase}``: how much of a phase the expert's replicas wait for the busiest of all replicas.

    1 - mean over its replicas of busy seconds / largest busy seconds; 0 for the busiest.

    Args:
        busy: replica -> phase -> seconds.
    """
    shares = {}
    for phase in dict.fromkeys(phase for own in busy.values() for phase in own):
        longest = max(own.get(phase, 0.0) for own in busy.values())
        for expert in placement.experts if longest else ():
            hosts = placement.replicas_of(expert)
            mean = sum(busy[replica].get(phase, 0.0) for replica in hosts) / len(hosts)
            shares[f"{expert}/idle/{phase}"] = 1 - mean / longest
    return shares


def measured(metrics: Mapping[str, float], experts: Sequence[str]) -> Measured:
    """What the schedule wants to know of a step's metrics."""
    pairs = [(a, b) for i, a in enumerate(experts) for b in experts[i + 1:]]
    return Measured(
        overlaps={(a, b): metrics[name] for a, b in pairs if (name := pair_name(a, b, "overlap")) in metrics},
        tokens={e: metrics[f"{e}/tokens"] for e in experts if f"{e}/tokens" in metrics},
        lengths={e: metrics[f"{e}/length"] for e in experts if f"{e}/length" in metrics})


def bring_deltas(samples: Sequence[Sample]) -> None:
    """Move the deltas of cross samples to the host, in one copy."""
    own = [sample for sample in samples if sample.delta is not None]
    if own:
        joined = torch.cat([sample.delta for sample in own]).cpu()
        for sample, delta in zip(own, joined.split([len(sample.delta) for sample in own])):
            sample.delta = delta


def _peak_bytes() -> int:
    """Most memory this process ever held: allocated on CUDA, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _on_host(sums: Sums) -> dict[str, tuple[float, float]]:
    """All sums as floats, brought over in one copy."""
    tensors = {name: value for name, (value, _) in sums.items() if isinstance(value, Tensor)}
    values = torch.stack([t.detach().double() for t in tensors.values()]).tolist() if tensors else []
    floats = dict(zip(tensors, values))
    return {name: (floats.get(name, value), weight) for name, (value, weight) in sums.items()}
