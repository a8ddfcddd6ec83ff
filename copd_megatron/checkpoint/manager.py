"""Saves, written in the background, and resumption; exports of policies.

checkpoints/step_000012/
    state.json          step, updates per expert, state of the loop, best evaluation, backbone hash, resolved
                        config; size and SHA-256 of every file that a resume reads, and of itself
    sharded/            Megatron dist_checkpointing: adapters and Adam moments
    random.pt           global random generators of every rank
    adapters/<policy>/  PEFT folders of every expert and of the merged policy

A save is written as step_000012.tmp and renamed when all of it is on disk, so it is whole or absent.
"""
from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from copd_megatron.checkpoint import whole_folder
from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.background import SHARDED, BackgroundSave, Files, describe
from copd_megatron.checkpoint.content import backbone_hash
from copd_megatron.checkpoint.huggingface import refuse_activated, save_merged
from copd_megatron.checkpoint.peft import full_factors, save_peft_adapter
from copd_megatron.checkpoint.random_state import (
    load_random_state,
    random_state,
    restore_random_state,
    save_random_states,
)
from copd_megatron.checkpoint.saves import ADAPTERS, FORMAT, newest_whole, prune, save_name, write_state
from copd_megatron.checkpoint.sharded import Optimizer, read_shards, take_snapshot
from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.parallel.groups import Groups
from copd_megatron.types import UserError

log = logging.getLogger(__name__)
RANDOM = "random.pt"
LOOK_EVERY_S = 0.02
EXIT_WAIT_S = 15.0
"""How long a run that ends by an error waits for other ranks to finish their part of a save."""


class Stateful(Protocol):
    """Something of the loop that remembers: a schedule, a topology, a data mixture."""

    def state(self) -> dict[str, Any]:
        """Plain JSON values, the same on every rank."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Inverse of ``state``."""


@dataclass
class RunState:
    """What a run is made of between two steps."""

    bank: AdapterBank
    optimizers: dict[str, Optimizer]
    """Of the hosted experts."""
    config_json: str
    step: int = 0
    """With the schedule's state also the cursor of every expert's data and the phase: both are functions of them."""
    best_accuracy: float = -1.0
    best_step: int = 0
    train_s: float = 0.0
    """Seconds trained before this start."""
    updates: dict[str, int] = field(default_factory=dict)
    """Updates per expert, all experts; filled by saving and loading."""
    loop: dict[str, Stateful] = field(default_factory=dict)
    """Parts of the loop with a state of their own, by name."""
    started: float = field(default_factory=time.monotonic)
    """When this start began, on the monotonic clock."""


class CheckpointManager:
    """Saves, loads and exports. Every rank calls every method; the main rank writes single files."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, groups: Groups, backbone: Path,
                 encoder: PromptEncoder):
        self.folder, self.config, self.groups = run_dir / "checkpoints", config, groups
        self.backbone, self.encoder = backbone, encoder
        self.prefix = TEXT_PREFIX[encoder.spec.family]
        self.backbone_hash = backbone_hash(backbone, groups.world)
        self._pending: BackgroundSave | None = None

    def save(self, state: RunState, policies: Sequence[str]) -> Path:
        """Save the run as it is now and PEFT folders of ``policies``, which every replica holds at this moment.

        Copies what changes and returns; the files are written while training goes on, and ``poll`` or
        ``wait`` tell of the end. Never two at once: waits for an earlier save first.

        Returns:
            The folder of the save; once it is there, older ones beyond ``keep_last`` are gone.

        Raises:
            UserError: on every rank, if no folder can be made, or the earlier save could not be written.
        """
        self.wait()
        groups, final = self.groups, self.folder / save_name(state.step)
        partial = final.with_name(final.name + ".tmp")
        self._on_main(final, lambda: whole_folder.begin(final))
        mine = {expert: optimizer.updates for expert, optimizer in state.optimizers.items()}
        state.updates = {e: n for part in all_gather_objects(mine, groups.world) for e, n in part.items()}
        snapshot = take_snapshot(state.bank, state.optimizers, state.updates, groups.rank)
        writes = all_gather_objects(not snapshot.is_empty, groups.world)
        exports = {policy: self._adapter(state.bank, policy) for policy in policies}
        states = [None] * groups.layout.world_size if groups.is_main else None
        dist.gather_object(random_state(), states, dst=0, group=groups.world)
        complete = None
        if groups.is_main:
            meta = self._describe(state)

            def complete(files: Files) -> None:
                for policy, adapter in exports.items():
                    save_peft_adapter(partial / ADAPTERS / policy, adapter, self.prefix, self.backbone)
                save_random_states(partial / RANDOM, states)
                write_state(partial, meta | {"files": files | describe(partial, [RANDOM])})
                whole_folder.finish(partial, final)
                prune(self.folder, meta["step"], self.config.keep_last, self.config.keep_every)

        writers = [rank for rank, has_data in enumerate(writes) if has_data]
        self._pending = BackgroundSave(partial, final, snapshot, writers, complete)
        return final

    def poll(self) -> Path | None:
        """The save that has become complete since the last call, if one has. A collective while one is under way.

        Raises:
            UserError: on every rank, if any rank could not write; earlier saves are untouched.
        """
        if self._pending is None:
            return None
        pending = self._pending
        done = pending.done  # before the problem, which is set before the thread ends
        reports = all_gather_objects((done, pending.problem), self.groups.world)
        problem = next((problem for _, problem in reports if problem is not None), None)
        if problem is None and not all(done for done, _ in reports):
            return None
        self._pending = None
        if problem is None:
            return pending.final
        pending.cancel()
        pending.join()
        all_gather_objects(None, self.groups.world)  # nobody writes any more
        self._on_main(pending.final, lambda: whole_folder.discard(pending.partial))
        raise problem

    def wait(self) -> Path | None:
        """Until no save is under way; its folder, if one was. Raises as ``poll``."""
        while self._pending is not None:
            self._pending.join(LOOK_EVERY_S)
            if path := self.poll():
                return path
        return None

    def close(self) -> None:
        """On the way out, perhaps after an error on this rank alone: let a save under way become whole.

        No collective: waits for this rank's part, and on the main rank for the others' a while.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.join(EXIT_WAIT_S if self.groups.is_main else None)
        finally:
            pending.cancel()
        pending.join()
        if pending.problem is not None or (self.groups.is_main and not pending.final.exists()):
            log.warning("%s was not completed (%s)", pending.final, pending.problem or "not all ranks wrote")

    def load_latest(self, state: RunState) -> Path:
        """Load the newest whole save into ``state``; damaged ones are skipped with a warning.

        Raises:
            UserError: there is none, or it belongs to another backbone, other adapters or, unless
                ``checkpoint.on_new_expert`` and ``on_missing_expert`` allow it, other experts.
        """
        found = newest_whole(self.folder, self.groups.world)
        if found is None:
            raise UserError(f"--resume: {self.folder} holds no complete save; a run resumes from one; start "
                            "without --resume in a new folder")
        path, meta = found
        self._check_fits(path, meta, state)
        read_shards(path / SHARDED, state.bank, state.optimizers, meta["updates"])
        state.step, state.train_s = meta["step"], meta["train_s"]
        state.updates = {expert: meta["updates"].get(expert, 0) for expert in self.groups.placement.experts}
        state.best_accuracy, state.best_step = meta["best_accuracy"], meta["best_step"]
        for name, part in state.loop.items():
            if name in meta["loop"]:
                part.load_state(meta["loop"][name])
        if meta["layout"] == self.groups.layout.key:  # else its ranks are not these ranks
            restore_random_state(load_random_state(path / RANDOM, self.groups.rank))
        if self.groups.is_main:
            log.info("resumed from %s (step %d)", path, state.step)
        return path

    def export_peft(self, state: RunState, policy: str, folder: Path) -> None:
        """Write one policy, which the main rank's replica holds, as a PEFT folder."""
        adapter = self._adapter(state.bank, policy)
        self._on_main(folder, lambda: save_peft_adapter(folder, adapter, self.prefix, self.backbone))

    def export_merged(self, state: RunState, policy: str, folder: Path) -> None:
        """Write one policy, which the main rank's replica holds, merged into dense weights.

        The result is a Hugging Face directory.

        Raises:
            UserError: scope ``completion``, whose adapted span depends on the prompt; or the disk refuses.
        """
        adapter = self._adapter(state.bank, policy)
        refuse_activated(adapter)
        self._on_main(folder, lambda: save_merged(folder, self.backbone, adapter, self.prefix))

    def _adapter(self, bank: AdapterBank, policy: str) -> Adapter:
        """One policy with full factors on the main rank; other replicas have none of them to collect."""
        factors = full_factors(bank, policy) if self.groups.coords.replica == 0 else {}
        header = self.encoder.invocation_token_ids if bank.config.scope == "completion" else None
        return Adapter(factors, bank.scaling_of(policy), header)

    def _describe(self, state: RunState) -> dict[str, Any]:
        """state.json of a save that begins now, without its files."""
        return {"format": FORMAT, "step": state.step, "updates": state.updates, "best_accuracy": state.best_accuracy,
                "best_step": state.best_step,
                "train_s": state.train_s + time.monotonic() - state.started,
                "loop": {name: part.state() for name, part in state.loop.items()},
                "backbone_hash": self.backbone_hash, "adapter": state.bank.config.model_dump(mode="json"),
                "layout": self.groups.layout.key, "config": json.loads(state.config_json)}

    def _check_fits(self, path: Path, meta: dict[str, Any], state: RunState) -> None:
        if meta["backbone_hash"] != self.backbone_hash:
            raise UserError(f"model.path: {self.backbone} is not the backbone of {path}; a save only fits "
                            "the backbone it was trained on; give its directory")
        adapter = state.bank.config.model_dump(mode="json")
        changed = [key for key, value in adapter.items() if meta["adapter"].get(key) != value]
        if changed:
            raise UserError(f"adapter.{changed[0]}: {adapter[changed[0]]!r}; {path} has "
                            f"{meta['adapter'].get(changed[0])!r}; set it to that, or start a new run")
        self._check_experts(path, list(meta["updates"]))

    def _check_experts(self, path: Path, saved: Sequence[str]) -> None:
        """Added or removed experts must be meant."""
        given = self.groups.placement.experts
        new, missing = [e for e in given if e not in saved], [e for e in saved if e not in given]
        for names, which, option, value in ((new, "not in", "on_new_expert", "init"),
                                            (missing, "only in", "on_missing_expert", "drop")):
            if names and getattr(self.config, option) == "refuse":
                raise UserError(f"experts: {names} {which} {path}, which has {sorted(saved)}; use the same "
                                f"experts, or set checkpoint.{option}={value}, or start a new run")
        if self.groups.is_main and (new or missing):
            log.warning("experts changed since %s: begun afresh %s, dropped %s", path, new, missing)

    def _on_main(self, target: Path, action: Callable[[], object]) -> None:
        """Run on the main rank; its failure is everybody's."""
        self._everywhere(target, action if self.groups.is_main else lambda: None)

    def _everywhere(self, target: Path, action: Callable[[], object]) -> None:
        """Run on every rank and wait for all; if any could not write, all raise the same UserError."""
        problem = None
        try:
            action()
        except whole_folder.WRITE_ERRORS as error:
            problem = whole_folder.cannot_write(target, "the save", error)
        except UserError as error:
            problem = error
        problems = [p for p in all_gather_objects(problem, self.groups.world) if p is not None]
        if problems:
            raise problems[0]
