"""The process groups of one rank, made once and handed down; Megatron's globals are touched here alone.

Elsewhere every group is an argument: a wrong group raises nothing and corrupts silently.

    exchange        same (pp, cp, tp) over all replicas
    adapter[e]      same (pp, cp, tp) over the replicas that host expert e: where e's gradients are reduced
    replica         all ranks of one copy of the backbone
    tp, pp, cp      Megatron's own, inside the replica
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup, distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from copd_megatron import platform
from copd_megatron.config.parallel import ParallelConfig
from copd_megatron.parallel.layout import Coordinates, Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.types import UserError

Partition = tuple[tuple[int, ...], ...]
"""Disjoint groups of global ranks that are created together, each with its members in group-rank order."""

MEGATRON_RNG_SEED = 1
"""Feeds Megatron's RNG tracker, which its attention enters even with dropout 0."""


def init_distributed(config: ParallelConfig) -> None:
    """Join the ranks that torchrun (or Slurm) started, or stand alone when nobody started us as a rank.

    Reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and LOCAL_RANK from the environment. Does nothing when
    torch.distributed is running already.

    Raises:
        UserError: NCCL was asked for without CUDA, gloo with it, a machine has more ranks than GPUs, or the
            environment is incomplete.
    """
    if dist.is_initialized():
        return
    backend = platform.default_backend() if config.backend == "auto" else config.backend
    if backend == "nccl" and not torch.cuda.is_available():
        raise UserError("parallel.backend: nccl on a machine without a CUDA device; gloo or auto work here; "
                        "set parallel.backend=auto")
    if backend == "gloo" and torch.cuda.is_available():
        raise UserError("parallel.backend: gloo on a machine with CUDA devices; nccl or auto work here; set "
                        "parallel.backend=auto, or hide the devices (CUDA_VISIBLE_DEVICES=) to use the CPU")
    timeout = timedelta(seconds=config.timeout_s)
    if os.getenv("RANK") is None:
        _stand_alone(backend, timeout)
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if os.getenv(name) is None]
    if missing:
        raise UserError(f"environment: RANK is set but {', '.join(missing)} is not; all or none of them; "
                        "start the ranks with torchrun, or unset RANK")
    device = None
    if backend == "nccl":
        torch.cuda.set_device(own_gpu(int(os.getenv("LOCAL_RANK", "0")), torch.cuda.device_count()))
        device = platform.device()
    dist.init_process_group(backend, timeout=timeout, device_id=device)


def own_gpu(local_rank: int, visible: int) -> int:
    """Which of the GPUs that this process sees is its own.

    Raises:
        UserError: there are not so many.
    """
    if local_rank >= visible:
        raise UserError(f"environment: LOCAL_RANK={local_rank} sees {visible} CUDA device{'s' * (visible != 1)}; each "
                        "rank of a machine has a GPU of its own; start fewer ranks, or, where each sees its own GPU "
                        "only, set LOCAL_RANK=0 for all")
    return local_rank


def shutdown_distributed() -> None:
    """Leave the other ranks; the counterpart of `init_distributed`, after `Groups.destroy`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _stand_alone(backend: str, timeout: timedelta) -> None:
    """A world of one rank: its store lives in this process, so no port is opened."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


@contextmanager
def imagined_world(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a world that does not exist: groups have members, their collectives move nothing.

    Torch's "fake" backend, for building what a rank would hold. Nothing computed inside means anything.

    Raises:
        RuntimeError: torch.distributed is running.
    """
    if dist.is_initialized():
        raise RuntimeError("torch.distributed is running; an imagined world needs a process of its own")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, eq=False)
class Groups:
    """All process groups that this rank is in, with its coordinates. Make it with `Groups.create`."""

    layout: Layout
    placement: Placement
    rank: int
    """Global rank."""
    coords: Coordinates
    world: ProcessGroup
    tp: ProcessGroup
    pp: ProcessGroup
    """One pipeline of this replica; group rank = stage."""
    cp: ProcessGroup
    replica: ProcessGroup
    """All ranks of this replica, in the order of `Layout.replica_ranks`."""
    exchange: ProcessGroup
    """Group rank = replica."""
    adapter: dict[str, ProcessGroup | None]
    """Expert -> its adapter group, None where this replica does not host it; equal hosts share one group."""
    pg_collection: ProcessGroupCollection
    """The same groups under Megatron's names, for its layers."""
    _owned: list[ProcessGroup] = field(default_factory=list, repr=False)

    @classmethod
    def create(cls, layout: Layout, placement: Placement, backend: str | None = None,
               timeout_s: float = 1800.0) -> Groups:
        """Create all groups; every rank of the world makes this call with equal arguments.

        A layout of one rank starts torch.distributed by itself when it is not running.

        Args:
            backend: of the groups; None takes the world's.
            timeout_s: collectives that wait longer fail.

        Raises:
            RuntimeError: torch.distributed is not running, or earlier groups still exist.
            ValueError: layout, placement and number of ranks disagree.
        """
        timeout = timedelta(seconds=timeout_s)
        if not dist.is_initialized():
            if layout.world_size != 1:
                raise RuntimeError("torch.distributed is not running; call init_distributed first")
            _stand_alone(backend or platform.default_backend(), timeout)
        if layout.world_size != dist.get_world_size() or placement.replicas != layout.replicas:
            raise ValueError(f"{layout.key} with experts on {placement.replicas} replicas does not fit "
                             f"{dist.get_world_size()} ranks")
        if parallel_state.model_parallel_is_initialized():
            raise RuntimeError("groups exist already in this process; call destroy() on them first")
        before = set(_alive())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp, expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            order="tp-cp-ep-dp-pp", create_gloo_process_groups=False,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)))
        model_parallel_cuda_manual_seed(MEGATRON_RNG_SEED, force_reset_rng=True)
        groups = cls._around_megatron(layout, placement, backend, timeout)
        groups._owned.extend(group for group in _alive() if group not in before)
        return groups

    @classmethod
    def _around_megatron(cls, layout: Layout, placement: Placement, backend: str | None,
                         timeout: timedelta) -> Groups:
        """Add our own groups to Megatron's, which exist."""
        rank = dist.get_rank()
        coords = layout.coordinates(rank)
        megatron = ProcessGroupCollection.use_mpu_process_groups()
        known = {_replicas(layout): megatron.mp} if layout.cp == 1 else {}  # Megatron's mp is tp x pp
        known[_peers(layout, range(layout.replicas))] = megatron.dp

        def group_of(partition: Partition) -> ProcessGroup | None:
            if partition not in known:
                known[partition] = _create(partition, rank, backend, timeout)
            return known[partition]

        replica = group_of(_replicas(layout))
        adapter = {}
        for expert, hosts in zip(placement.experts, placement.hosts):
            group = group_of(_peers(layout, hosts))
            adapter[expert] = group if coords.replica in hosts else None
        return cls(layout=layout, placement=placement, rank=rank, coords=coords, world=dist.group.WORLD,
                   tp=megatron.tp, pp=megatron.pp, cp=megatron.cp, replica=replica, exchange=megatron.dp,
                   adapter=adapter, pg_collection=megatron)

    def destroy(self) -> None:
        """Drop all groups but the world, so that `create` may be called again. All ranks call it."""
        # Megatron only forgets its groups; each keeps three threads until it is destroyed.
        parallel_state.destroy_model_parallel()
        for group in self._owned:
            dist.destroy_process_group(group)
        self._owned.clear()

    @property
    def hosted(self) -> tuple[str, ...]:
        """Experts that this replica hosts, in expert order."""
        return self.placement.experts_of(self.coords.replica)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.coords.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.coords.pp == self.layout.pp - 1

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0."""
        return self.rank == 0

    @property
    def is_replica_main(self) -> bool:
        """Whether this is the one rank that speaks for its replica."""
        return self.rank == self.first_rank

    @property
    def first_rank(self) -> int:
        """Global rank of this replica's first rank: stage 0, cp 0, tp 0."""
        return self.layout.rank_of(self.coords.replica)

    @property
    def first_stage_rank(self) -> int:
        """Global rank of the first stage of this rank's own pipeline (same cp and tp)."""
        return self.layout.rank_of(self.coords.replica, 0, self.coords.cp, self.coords.tp)

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's own pipeline (same cp and tp)."""
        return self.layout.rank_of(self.coords.replica, self.layout.pp - 1, self.coords.cp, self.coords.tp)


def _alive() -> list[ProcessGroup]:
    """All groups of this process but the world. torch has no public list of them."""
    return [group for group in distributed_c10d._world.pg_map if group is not dist.group.WORLD]


def _replicas(layout: Layout) -> Partition:
    return tuple(layout.replica_ranks(replica) for replica in range(layout.replicas))


def _peers(layout: Layout, replicas: Iterable[int]) -> Partition:
    return tuple(layout.peers(pp, cp, tp, tuple(replicas)) for pp, cp, tp in layout.cells())


def _create(partition: Partition, rank: int, backend: str | None, timeout: timedelta) -> ProcessGroup | None:
    """Create all groups of a partition, as torch wants every rank to do in one order; returns this rank's."""
    mine = None
    for ranks in partition:
        group = dist.new_group(ranks=list(ranks), timeout=timeout, backend=backend)
        if rank in ranks:
            mine = group
    return mine
