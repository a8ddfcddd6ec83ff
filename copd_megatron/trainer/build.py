"""The composition root: a config becomes a trainer. Values travel up through here; folders meet nowhere else."""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from copd_megatron.checkpoint.manager import CheckpointManager, RunState
from copd_megatron.checkpoint.peft import load_peft_adapter
from copd_megatron.checkpoint.warm_start import start_expert
from copd_megatron.config.loading import to_json
from copd_megatron.config.losses import RlvrConfig
from copd_megatron.config.reference import resolve_object
from copd_megatron.config.run import RunConfig
from copd_megatron.exchange.schedule import Schedule
from copd_megatron.metrics.progress import make_progress
from copd_megatron.metrics.recorder import Recorder
from copd_megatron.metrics.rollout_writer import RolloutWriter
from copd_megatron.metrics.sinks import replace_file
from copd_megatron.metrics.timers import Timers
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import check_backbone, load_backbone_weights
from copd_megatron.parallel.groups import Groups, init_distributed
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from copd_megatron.platform import setup_platform
from copd_megatron.rollout.collector import Collector, sampling_params
from copd_megatron.rollout.megatron_engine import MegatronEngine
from copd_megatron.tasks.base import Task
from copd_megatron.tasks.loading import build_task
from copd_megatron.tasks.rewards import Scorer
from copd_megatron.trainer.evaluator import Evaluator
from copd_megatron.trainer.forward import Runner, visual_features
from copd_megatron.trainer.learner import Learner
from copd_megatron.trainer.milestones import Milestones
from copd_megatron.trainer.opd_phase import CrossBatch
from copd_megatron.trainer.optimizer import ExpertOptimizer
from copd_megatron.trainer.prompts import PromptSource
from copd_megatron.trainer.rlvr_phase import NativeBatch
from copd_megatron.trainer.scoring import REFERENCE, Scoring
from copd_megatron.trainer.trainer import Trainer
from copd_megatron.types import BACKBONE, UserError


@dataclass(frozen=True, eq=False)
class Policies:
    """The model side of a run: what sampling, scoring and evaluation need, without training."""

    groups: Groups
    backbone: Backbone
    runner: Runner
    encoder: PromptEncoder
    tasks: dict[str, Task]
    source: PromptSource
    collector: Collector
    timers: Timers

    def evaluator(self, config: RunConfig) -> Evaluator:
        """Asks held-out questions as ``config.evaluation`` says."""
        return Evaluator(self.collector, self.source, self.groups, config.evaluation,
                         config.rollout.max_completion_tokens, self.encoder.stop_token_ids)


def build_policies(config: RunConfig) -> Policies:
    """Check everything that can be checked without weights, then load the backbone and add fresh experts.

    Raises:
        UserError: a backbone, task, layout or option that does not fit, before any weight is read.
    """
    setup_platform()
    spec = check_backbone(config.model.path)
    spec.check_adapter(config.adapter)
    encoder = PromptEncoder(config.model.path)
    invocation = encoder.invocation_token_ids if config.adapter.scope == "completion" else None
    reference, teachers, starts = check_adapter_folders(config)
    tasks = {name: build_task(expert, name) for name, expert in config.experts.items()}
    scorers = {name: Scorer(tasks[name], expert.rewards, f"experts.{name}.rewards")
               for name, expert in config.experts.items()}
    init_distributed(config.parallel)
    layout = Layout.of(config.parallel, torch.distributed.get_world_size())
    spec.check_layout(layout)
    groups = Groups.create(layout, place(config, layout.replicas), timeout_s=config.parallel.timeout_s)
    source = PromptSource(tasks, encoder, config.seed, config.rollout.max_prompt_tokens)
    if config.rollout.long_prompts == "drop":
        source.drop_long(groups)
    _check_questions(source)
    backbone = Backbone(spec, groups, config.model, config.adapter, config.parallel.debug_checks)
    load_backbone_weights(backbone, config.model.path)
    backbone.eval()
    for expert in groups.hosted:
        backbone.bank.add_expert(expert, config.seed)
        if expert in starts:
            start_expert(backbone.bank, expert, starts[expert], invocation)
    if reference:
        load_peft_adapter(backbone.bank, REFERENCE, reference, invocation)
    for name, folder in teachers.items():
        load_peft_adapter(backbone.bank, name, folder, invocation)
    timers = Timers()
    visual = visual_features(config.model, backbone, timers)
    engine = MegatronEngine(backbone, groups, config.rollout, config.seed)
    collector = Collector(engine, encoder, tasks, scorers, visual, groups, timers)
    runner = Runner(backbone, groups, visual, engine.prefill)
    return Policies(groups, backbone, runner, encoder, tasks, source, collector, timers)


def place(config: RunConfig, replicas: int) -> Placement:
    """Experts by their weights, frozen teachers everywhere."""
    weights = {name: expert.weight for name, expert in config.experts.items()}
    return Placement.build(list(config.experts), replicas, weights, (*config.exchange.frozen_teachers, BACKBONE))


def check_adapter_folders(config: RunConfig) -> tuple[Path | None, dict[str, Path], dict[str, Path]]:
    """Folders of the KL penalty's reference, if it has one, of the frozen teachers, and of what experts start from.

    Raises:
        UserError: one is no PEFT adapter.
    """
    teachers = {name: _adapter_folder(folder, f"exchange.frozen_teachers.{name}", "a PEFT adapter folder")
                for name, folder in config.exchange.frozen_teachers.items()}
    starts = {name: _adapter_folder(expert.init_from, f"experts.{name}.init_from", "a PEFT adapter folder")
              for name, expert in config.experts.items() if expert.init_from}
    return _reference_folder(config.rlvr), teachers, starts


def _reference_folder(config: RlvrConfig) -> Path | None:
    """The PEFT folder of the KL penalty's reference, if it has one."""
    if not config.kl_coef or config.kl_reference == "backbone":
        return None
    return _adapter_folder(config.kl_reference, "rlvr.kl_reference", "backbone or a PEFT adapter folder")


def _adapter_folder(given: str, field: str, allowed: str) -> Path:
    """A folder that looks like a PEFT adapter."""
    folder = Path(given)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{field}: {folder} has no adapter_config.json; allowed is {allowed}; correct the path")
    return folder


def _check_questions(source: PromptSource) -> None:
    """Encode a question of each split: better now than after hours, or at the evaluation that ends the run."""
    for domain in source.tasks:
        source.train(domain, 0)
        if not source.held_out(domain, 1):
            raise UserError(f"experts.{domain}.task: its held-out split is empty; at least one question is needed; "
                            "give the task held-out data")


def build_trainer(config: RunConfig, run_dir: Path, resume: bool = False) -> Trainer:
    """Everything of a run, ready for ``run()``; with ``resume`` from its newest complete save."""
    schedule = Schedule.build(config.schedule, config.exchange, config.opd, list(config.experts), resolve_object,
                              config.seed)
    own_loss = _function(config.rlvr.loss_function, "rlvr.loss_function")
    own_advantage = _function(config.rlvr.advantage_function, "rlvr.advantage_function")
    policies = build_policies(config)
    groups, runner = policies.groups, policies.runner
    state, checkpoints = run_state(config, run_dir, policies, schedule)
    resumed = checkpoints.load_latest(state) if resume else None
    params = sampling_params(config.rollout, policies.encoder)
    native = NativeBatch(policies.source, groups, schedule, config.rollout, config.rlvr, params, own_advantage)
    checked = config.parallel.debug_checks
    cross = CrossBatch(policies.source, groups, config.rollout, config.opd, native, params, checked)
    budget = config.optimizer.microbatch_tokens
    scoring = Scoring(runner, groups, cross, config.rlvr, config.opd, config.rollout, budget,
                      config.exchange.transport, checked)
    learner = Learner(runner, groups, state.optimizers, config.rlvr, config.opd, config.rollout, budget, own_loss)
    milestones = _milestones(config, run_dir, policies, state, checkpoints, schedule.total_steps, resumed)
    return Trainer(config, groups, runner, policies.collector, native, cross, scoring, learner, schedule,
                   milestones, milestones.timers, state.step)


def _function(given: Any, field: str) -> Callable[..., Any] | None:
    """A recipe's own function, given as it is or by name."""
    function = resolve_object(given, field)
    if function is not None and not callable(function):
        raise UserError(f"{field}: a {type(function).__name__} was given; allowed is a function or "
                        "'pkg.module:name'; correct it")
    return function


def run_state(config: RunConfig, run_dir: Path, policies: Policies,
              schedule: Schedule | None = None) -> tuple[RunState, CheckpointManager]:
    """The state of a run that has not begun, and what saves and loads it.

    Args:
        schedule: saved and loaded with the rest; None where only the policies matter.
    """
    bank, groups = policies.backbone.bank, policies.groups
    optimizers = {e: ExpertOptimizer(e, bank, groups, config.optimizer) for e in groups.hosted}
    loop = {} if schedule is None else {"schedule": schedule}
    state = RunState(bank=bank, optimizers=optimizers, config_json=to_json(config), loop=loop)
    return state, CheckpointManager(run_dir, config.checkpoint, groups, Path(config.model.path), policies.encoder)


def _milestones(config: RunConfig, run_dir: Path, policies: Policies, state: RunState,
                checkpoints: CheckpointManager, total_steps: int, resumed: Path | None) -> Milestones:
    groups, encoder = policies.groups, policies.encoder
    first = state.step if resumed else None
    if groups.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_file(run_dir / "config.json", state.config_json.encode())
    recorder = Recorder(run_dir, config.metrics, first, writes=groups.is_main,
                        run_config=json.loads(state.config_json))
    rollouts = None
    if groups.is_last_stage and groups.coords.tp == 0 and groups.coords.cp == 0:
        rollouts = RolloutWriter(run_dir, lambda ids: encoder.decode(ids, skip_special_tokens=False),
                                 enabled=config.metrics.rollouts, resume_step=first, shard=groups.coords.replica,
                                 shards=groups.layout.replicas, on_failure=recorder.count_failure)
    progress = make_progress(config.metrics.progress if groups.is_main else "off", experts=list(config.experts),
                             total_steps=total_steps, first_step=state.step)
    policies.timers.on_phase = progress.phase
    return Milestones(config, run_dir, groups, state, policies.evaluator(config), checkpoints, recorder, rollouts,
                      progress, policies.timers, total_steps, resumed)
