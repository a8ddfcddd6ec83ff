"""Numbers of one step from all ranks: sums with weights, and samples of values for percentiles."""
from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from copd_megatron.metrics.names import edge_name
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.trainer.batching import Sample

Sums = dict[str, tuple[Tensor | float, float]]
"""Metric name -> (sum, weight); the metric is the ratio of both, added up over microbatches and ranks. A weight
of 0 marks a plain sum."""

VALUES_PER_EDGE = 4096
"""Deltas each replica contributes to an edge's percentiles."""
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

    @property
    def speaks(self) -> bool:
        """Whether this rank has its replica's numbers: last stage, first TP rank."""
        return self.groups.is_last_stage and self.groups.coords.tp == 0 and self.groups.coords.cp == 0

    def add(self, sums: Mapping[str, tuple[Tensor | float, float]]) -> None:
        """Add sums and weights."""
        add_sums(self._sums, sums)

    def add_deltas(self, samples: Sequence[Sample]) -> None:
        """Remember the deltas of cross samples for percentiles."""
        by_edge: dict[str, list[Tensor]] = defaultdict(list)
        for sample in samples:
            if sample.delta is not None:
                by_edge[edge_name(sample.edge.teacher, sample.edge.student, "")].append(sample.delta)
        for name, parts in by_edge.items():
            values = torch.cat(parts).float().cpu().numpy()
            stride = max(1, len(values) // VALUES_PER_EDGE)
            self._values[name] = values[::stride]

    def reduce(self) -> dict[str, float]:
        """The step's metrics over all replicas, the same on every rank."""
        spoken = (_on_host(self._sums), self._values) if self.speaks else ({}, {})
        totals: Sums = {}
        values: dict[str, list[np.ndarray]] = defaultdict(list)
        peaks = []
        for (sums, arrays), peak in all_gather_objects((spoken, _peak_bytes()), self.groups.world):
            add_sums(totals, sums)
            for name, array in arrays.items():
                values[name].append(array)
            peaks.append(peak)
        metrics = {name: value / weight if weight else value for name, (value, weight) in totals.items()}
        metrics["memory/peak_bytes"] = float(max(peaks))
        for name, arrays in values.items():
            joined = np.concatenate(arrays)
            if len(joined):
                metrics |= {name + what: float(np.percentile(joined, q)) for what, q in PERCENTILES.items()}
        return metrics


def _peak_bytes() -> int:
    """Most memory this process ever held: allocated on CUDA, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _on_host(sums: Sums) -> dict[str, tuple[float, float]]:
    """All sums as floats, brought over in one copy: the only wait for the device in a step's numbers."""
    tensors = {name: value for name, (value, _) in sums.items() if isinstance(value, Tensor)}
    values = torch.stack([t.detach().double() for t in tensors.values()]).tolist() if tensors else []
    floats = dict(zip(tensors, values))
    return {name: (floats.get(name, value), weight) for name, (value, weight) in sums.items()}
