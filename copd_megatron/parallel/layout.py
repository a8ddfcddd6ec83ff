"""Where every rank stands: arithmetic between a rank number and its coordinates.

Ranks are numbered in Megatron-Core's order "tp-cp-ep-dp-pp", tensor parallelism fastest:

    rank = ((pp * replicas + replica) * CP + cp) * TP + tp

so the ranks of one tensor-parallel group are neighbours (one node, NVLink) and pipeline stages lie farthest
apart. Megatron's data-parallel axis is our axis of replicas.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from copd_megatron.config.parallel import ParallelConfig
from copd_megatron.types import UserError


@dataclass(frozen=True, order=True)
class Coordinates:
    """Position of one rank. Example: ``Coordinates(replica=1, pp=0, cp=0, tp=1)``."""

    replica: int
    pp: int
    cp: int
    tp: int
    ep: int = 0
    """MoE-expert axis, folded inside the replica; always 0 while EP is 1."""
    etp: int = 0
    """Tensor axis of MoE experts, folded inside the replica; always 0 while ETP is 1."""


@dataclass(frozen=True)
class Layout:
    """Sizes of all axes. World size = replicas x TP x PP x CP. Example: ``Layout(tp=2, pp=1, replicas=3)``.

    MoE experts are cut over the same ranks: ETP x EP = TP x CP, so that no EP group crosses replicas. Both are
    1 where the backbone has no MoE layers.

    Raises:
        UserError: a size below 1, ETP x EP that is neither 1 nor TP x CP, sequence parallelism without TP, or VP
            without 3 stages.
    """

    tp: int = 1
    pp: int = 1
    replicas: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    vp: int = 1
    """Chunks of layers on each pipeline stage; chunk c of PP x VP is on stage c % PP."""
    sequence_parallel: bool = False
    """Between the linears of a layer the TP ranks hold a share of the rows each, not all of them."""

    def __post_init__(self) -> None:
        for field, size in (("tensor", self.tp), ("pipeline", self.pp), ("replicas", self.replicas),
                            ("context", self.cp), ("moe_expert", self.ep), ("moe_expert_tensor", self.etp),
                            ("virtual_pipeline", self.vp)):
            if size < 1:
                raise UserError(f"parallel.{field}: {size}; sizes are 1 or more; leave it out for 1")
        if self.ep * self.etp not in (1, self.tp * self.cp):
            raise UserError(
                f"parallel.moe_expert, parallel.moe_expert_tensor: {self.ep} x {self.etp} = {self.ep * self.etp}; "
                f"MoE experts are cut over the {self.tp * self.cp} ranks of parallel.tensor x parallel.context, so "
                f"the product must be {self.tp * self.cp} (or 1 without MoE layers); change one of the four")
        if self.vp > 1 and self.pp < 3:
            raise UserError(f"parallel.virtual_pipeline: {self.vp} with parallel.pipeline={self.pp}; it needs 3 or "
                            "more stages, as with 2 both neighbours of a stage are one rank, whose messages Megatron's "
                            "interleaved schedule confuses; raise parallel.pipeline or set it to 1")
        if self.sequence_parallel and self.tp == 1:
            raise UserError("parallel.sequence_parallel: true with parallel.tensor 1; it splits rows over 2 or more "
                            "tensor-parallel ranks; raise parallel.tensor or set it to false")

    @classmethod
    def fit(cls, world_size: int, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1,
            sequence_parallel: bool = False, vp: int = 1) -> Layout:
        """The layout of ``world_size`` ranks: what TP, PP and CP leave over becomes replicas.

        Raises:
            UserError: ``tp * pp * cp`` does not divide the world size.
        """
        one = cls(tp=tp, pp=pp, cp=cp, ep=ep, etp=etp, vp=vp, sequence_parallel=sequence_parallel)
        per_replica = one.ranks_per_replica
        if world_size % per_replica:
            raise UserError(f"parallel.tensor, parallel.pipeline, parallel.context: {tp} x {pp} x {cp} = {per_replica} "
                            f"ranks per replica, {world_size} ranks started; the product must divide their number; "
                            f"start a multiple of {per_replica} ranks or choose smaller sizes")
        return replace(one, replicas=world_size // per_replica)

    @classmethod
    def of(cls, config: ParallelConfig, world_size: int) -> Layout:
        """The layout that a config asks for, see ``fit``."""
        return cls.fit(world_size, config.tensor, config.pipeline, config.context, config.moe_expert,
                       config.moe_expert_tensor, config.sequence_parallel, config.virtual_pipeline)

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that together hold one copy of the backbone: TP x PP x CP."""
        return self.tp * self.pp * self.cp

    @property
    def world_size(self) -> int:
        return self.replicas * self.ranks_per_replica

    def filled_up(self, microbatches: int) -> int:
        """How many microbatches a pass has in the end: Megatron's interleaved schedule takes multiples of PP."""
        return microbatches + (-microbatches % self.pp if self.vp > 1 else 0)

    @property
    def key(self) -> str:
        """Names the layout in plans and checkpoints, e.g. "tp2-cp1-ep1-etp1-pp2-replicas3"."""
        chunks = f"-vp{self.vp}" if self.vp > 1 else ""
        return f"tp{self.tp}-cp{self.cp}-ep{self.ep}-etp{self.etp}-pp{self.pp}{chunks}-replicas{self.replicas}"

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a global rank, 0 <= rank < world size."""
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is not in 0..{self.world_size - 1} of {self.key}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, replica = divmod(rest, self.replicas)
        ep, etp = self._folded(cp, tp)
        return Coordinates(replica=replica, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)

    def rank_of(self, replica: int = 0, pp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """Global rank at these coordinates; the inverse of `coordinates`."""
        for axis, at, size in (("replica", replica, self.replicas), ("pp", pp, self.pp), ("cp", cp, self.cp),
                               ("tp", tp, self.tp)):
            if not 0 <= at < size:
                raise IndexError(f"{axis} {at} is not in 0..{size - 1} of {self.key}")
        return ((pp * self.replicas + replica) * self.cp + cp) * self.tp + tp

    def _folded(self, cp: int, tp: int) -> tuple[int, int]:
        """(ep, etp) of a cell: its ranks in order, the tensor axis of MoE experts fastest, as Megatron has it."""
        return divmod(cp * self.tp + tp, self.etp) if self.ep * self.etp > 1 else (0, 0)

    def moe_expert_peers(self, replica: int, pp: int, etp: int) -> tuple[int, ...]:
        """Global ranks of one EP group, in ep order: the ranks that hold different MoE experts."""
        return tuple(self.rank_of(replica, pp, cp, tp) for cp in range(self.cp) for tp in range(self.tp)
                     if self._folded(cp, tp)[1] == etp)

    def replica_ranks(self, replica: int) -> tuple[int, ...]:
        """Global ranks of one replica, first pipeline stage first."""
        return tuple(self.rank_of(replica, pp, cp, tp) for pp, cp, tp in self.cells())

    def peers(self, pp: int, cp: int, tp: int, replicas: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Global ranks at one (pp, cp, tp) over the given replicas (all by default), in replica order."""
        return tuple(self.rank_of(replica, pp, cp, tp) for replica in (replicas or range(self.replicas)))

    def cells(self) -> Iterator[tuple[int, int, int]]:
        """All (pp, cp, tp) of one replica, in rank order."""
        return ((pp, cp, tp) for pp in range(self.pp) for cp in range(self.cp) for tp in range(self.tp))
