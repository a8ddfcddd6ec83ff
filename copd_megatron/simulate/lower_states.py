"""How much of a step begins at ``adapter.first_layer``, from states that its rollout kept, and what they take.

A kept row is hidden size numbers. Kept are the rows that decoding feeds to the layers (a completion of R tokens has
f + R - 1), then, as far as there is room, prompts, each once per replica, unless the prefix store serves training.
"""
from __future__ import annotations

from copd_megatron.model.backbone import DTYPES
from copd_megatron.parallel.placement import Placement
from copd_megatron.simulate.job import Group, Job


def wanted_bytes(job: Job, placement: Placement, replica: int, context: int, opd: bool = True) -> tuple[float, float]:
    """Bytes of all completions and of all prompts that a context rank of this replica could keep in a step."""
    rows, prompts = 0, {}
    for group in job.decoded(job.groups(placement, replica, opd)):
        own = job.rows(group.domain, job.rollout.group_size)
        rows += group.count * own.leaves
        # Students answer prompts of a native batch.
        prompts[group.domain] = max(prompts.get(group.domain, 0), group.count * own.trunk)
    stored = job.rollout.prefix_store_bytes > 0 and job.adapter.scope == "completion"
    row = job.spec.hidden_size * DTYPES[job.model.dtype].itemsize / context
    return rows * row, 0.0 if stored else sum(prompts.values()) * row


def kept_bytes(job: Job, placement: Placement, replica: int, context: int) -> float:
    """Bytes that a rank of the stage that holds ``first_layer`` keeps at most."""
    return min(job.rollout.lower_states_bytes, sum(wanted_bytes(job, placement, replica, context)))


def kept_shares(job: Job, placement: Placement, replica: int, context: int, opd: bool = True) -> tuple[float, float]:
    """Shares of a step's completions and prompts that find room."""
    room = job.rollout.lower_states_bytes
    if not room:
        return 0.0, 0.0
    completions, prompts = wanted_bytes(job, placement, replica, context, opd)
    if room < completions:
        return room / completions, 0.0
    return 1.0, min(1.0, (room - completions) / prompts) if prompts else 1.0


def sampled_here(job: Job, placement: Placement, replica: int, group: Group) -> float:
    """Share of the completions that a replica learns from in a group which it has sampled itself."""
    if group.edge is None or job.opd.rollouts == "fresh":
        return 1.0
    hosts = placement.replicas_of(group.domain)
    return (replica in hosts) / len(hosts)
