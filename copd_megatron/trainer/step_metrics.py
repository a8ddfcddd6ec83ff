"""Numbers of one step from all ranks: sums with weights, and samples of values for percentiles."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from copd_megatron.metrics.names import edge_name
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.trainer.batching import Sample

VALUES_PER_EDGE = 4096
"""Deltas each replica contributes to an edge's percentiles."""
PERCENTILES = {"delta_p05": 5, "delta_p50": 50, "delta_p95": 95}


class StepMetrics:
    """Collects (sum, weight) pairs on every rank; one rank per replica speaks for it.

    A weight of 0 marks a plain sum.
    """

    def __init__(self, groups: Groups):
        self.groups = groups
        self._sums: dict[str, list] = defaultdict(lambda: [0.0, 0.0])
        self._values: dict[str, np.ndarray] = {}

    @property
    def speaks(self) -> bool:
        """Whether this rank has its replica's numbers: last stage, first TP rank."""
        return self.groups.is_last_stage and self.groups.coords.tp == 0 and self.groups.coords.cp == 0

    def add(self, sums: Mapping[str, tuple[Tensor | float, float]]) -> None:
        """Add sums and weights."""
        for name, (value, weight) in sums.items():
            self._sums[name][0] += value
            self._sums[name][1] += weight

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
        mine = None
        if self.speaks:
            mine = ({name: (float(value), float(weight)) for name, (value, weight) in self._sums.items()},
                    self._values)
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        values: dict[str, list[np.ndarray]] = defaultdict(list)
        for part in all_gather_objects(mine, self.groups.world):
            for name, (value, weight) in (part[0] if part else {}).items():
                totals[name][0] += value
                totals[name][1] += weight
            for name, array in (part[1] if part else {}).items():
                values[name].append(array)
        metrics = {name: value / weight if weight else value for name, (value, weight) in totals.items()}
        for name, arrays in values.items():
            joined = np.concatenate(arrays)
            if len(joined):
                metrics |= {name + what: float(np.percentile(joined, q)) for what, q in PERCENTILES.items()}
        return metrics
