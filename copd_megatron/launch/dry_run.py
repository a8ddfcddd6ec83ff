"""``copd train --dry-run``: what every kind of rank of a run would hold, built of shapes without values.

The trainer's own groups, backbone and adapters on torch's "meta" device, one rank after the other, in an imagined
world of any size: nothing is allocated, no weights are read. A backbone directory with nothing but its
``config.json`` is enough. What a run needs besides (weights, tokenizer, data, adapter folders) is looked for, and
what is not there or not in order is listed.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from copd_megatron.config.loading import to_json
from copd_megatron.config.reference import resolve_object
from copd_megatron.config.run import RunConfig
from copd_megatron.exchange.schedule import Schedule
from copd_megatron.launch.plan import size_text
from copd_megatron.launch.table import format_table
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import check_backbone
from copd_megatron.parallel.groups import Groups, imagined_world
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.platform import only_shapes
from copd_megatron.tasks.loading import build_task
from copd_megatron.tasks.rewards import Scorer
from copd_megatron.trainer.build import check_adapter_folders, place
from copd_megatron.types import UserError


@dataclass(frozen=True)
class BuiltRank:
    """What one rank would hold. ``ranks`` of the world hold as much: all of its stage on replicas that host as many
    of the same experts."""

    rank: int
    ranks: int
    stage: int
    experts: tuple[str, ...]
    chunks: list[range]
    """Layers: one run of neighbours, or several (``parallel.virtual_pipeline``)."""
    shapes: dict[str, tuple[int, ...]]
    """Backbone parameter -> shape."""
    backbone_bytes: int
    adapter_bytes: int
    """Of all hosted experts together, without optimizer state."""


def dry_run(config: RunConfig, world_size: int) -> str:
    """Build a run on so many ranks without starting it; the result for people.

    Raises:
        UserError: anything about the run itself that does not fit: backbone family, layout, schedule, functions.
    """
    spec = read_spec(config.model.path)
    spec.check_adapter(config.adapter)
    Schedule.build(config.schedule, config.exchange, config.opd, list(config.experts), resolve_object, config.seed)
    layout = Layout.of(config.parallel, world_size)
    placement = place(config, layout.replicas)
    built = list(built_ranks(config, spec, layout, placement))
    to_json(config)
    rows = [[str(b.rank), str(b.ranks), str(b.stage), " and ".join(f"{c.start} to {c.stop - 1}" for c in b.chunks),
             ", ".join(b.experts) or "none", str(len(b.shapes)), size_text(b.backbone_bytes),
             size_text(b.adapter_bytes)] for b in built]
    header = ["rank", "ranks like it", "stage", "layers", "experts", "tensors", "backbone", "adapters"]
    missing = missing_inputs(config)
    lines = [f"{layout.key}: every kind of rank was built", format_table(header, rows), ""]
    lines += ["not ready to train:", *(f"  {line}" for line in missing)] if missing else ["ready to train"]
    return "\n".join(lines)


def built_ranks(config: RunConfig, spec: BackboneSpec, layout: Layout, placement: Placement) -> Iterator[BuiltRank]:
    """One rank of each kind: pipeline stage x hosted experts. Tensor and context ranks of a stage are alike."""
    by_hosted: dict[tuple[str, ...], list[int]] = {}
    for replica in range(layout.replicas):
        by_hosted.setdefault(placement.experts_of(replica), []).append(replica)
    for replicas in by_hosted.values():
        for stage in range(layout.pp):
            rank = layout.rank_of(replicas[0], stage)
            alike = len(replicas) * layout.ranks_per_replica // layout.pp
            yield _built(config, spec, layout, placement, rank, alike)


def _built(config: RunConfig, spec: BackboneSpec, layout: Layout, placement: Placement, rank: int,
           alike: int) -> BuiltRank:
    with imagined_world(rank, layout.world_size):
        groups = Groups.create(layout, placement)
        try:
            with only_shapes():
                backbone = Backbone(spec, groups, config.model, config.adapter)
                for expert in groups.hosted:
                    backbone.bank.add_expert(expert, config.seed)
            adapters = {id(p) for p in backbone.bank.parameters()}
            own = {name: p for name, p in backbone.named_parameters() if id(p) not in adapters}
            return BuiltRank(rank, alike, groups.coords.pp, groups.hosted, backbone.chunks,
                             {name: tuple(p.shape) for name, p in own.items()},
                             sum(p.numel() * p.element_size() for p in own.values()),
                             sum(p.numel() * p.element_size() for p in backbone.bank.parameters()))
        finally:
            groups.destroy()


def missing_inputs(config: RunConfig) -> list[str]:
    """What training would stop at before its first step, one line each, as training would say it."""
    path = config.model.path
    checks: list[Callable[[], Any]] = [lambda: check_backbone(path), lambda: PromptEncoder(path),
                                       lambda: check_adapter_folders(config)]
    checks += [lambda name=name: _check_expert(config, name) for name in config.experts]
    return list(_messages(checks))


def _check_expert(config: RunConfig, name: str) -> None:
    expert = config.experts[name]
    Scorer(build_task(expert, name), expert.rewards, f"experts.{name}.rewards")


def _messages(checks: Sequence[Callable[[], Any]]) -> Iterator[str]:
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)
