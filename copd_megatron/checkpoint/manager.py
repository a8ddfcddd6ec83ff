"""Saves that are whole or absent: written to a temporary name, verified, renamed, the oldest removed.

checkpoints/step_000012/
    state.json          step, updates per expert, best evaluation, backbone hash, resolved config
    sharded/            Megatron dist_checkpointing: adapters and Adam moments, with a SHA-256 manifest
    adapters/<policy>/  PEFT folders of every expert and of the merged policy
"""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from copd_megatron.checkpoint.huggingface import save_merged
from copd_megatron.checkpoint.peft import full_factors, save_peft_adapter
from copd_megatron.checkpoint.sharded import Optimizer, restore, sharded_state
from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.safetensor_reader import content_hash
from copd_megatron.parallel.collectives import all_gather_objects, broadcast_object
from copd_megatron.parallel.groups import Groups
from copd_megatron.types import UserError

log = logging.getLogger(__name__)
STATE, SHARDED = "state.json", "sharded"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass
class RunState:
    """What a run is made of between two steps."""

    bank: AdapterBank
    optimizers: dict[str, Optimizer]
    """Of the hosted experts."""
    config_json: str
    step: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    train_s: float = 0.0
    """Seconds trained before this start."""
    updates: dict[str, int] = field(default_factory=dict)
    """Updates per expert, all experts; filled by saving and loading."""


class CheckpointManager:
    """Saves, loads and exports. Every rank calls every method; the main rank writes single files."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, groups: Groups, backbone: Path,
                 encoder: PromptEncoder):
        self.folder, self.config, self.groups, self.backbone = run_dir / "checkpoints", config, groups, backbone
        self.encoder = encoder
        self.backbone_hash = content_hash(backbone)

    def save(self, state: RunState, policies: Sequence[str]) -> Path:
        """Save the run and PEFT folders of ``policies``, which every replica holds at this moment.

        Raises:
            UserError: on every rank, if any rank could not write; earlier saves are untouched.
        """
        final = self.folder / f"step_{state.step:06d}"
        partial = final.with_name(final.name + ".tmp")
        self._main(lambda: _fresh(partial / SHARDED))
        updates = self._all_updates(state)

        def write() -> None:
            shards = {k: v for expert in self.groups.hosted
                      for k, v in sharded_state(state.bank, state.optimizers, expert, updates[expert] > 0).items()}
            dist_checkpointing.save(shards, str(partial / SHARDED), verify_integrity=True)

        self._everywhere(write, final)
        for policy in policies:
            self._write_peft(state, policy, partial / "adapters" / policy)
        self._main(lambda: self._complete(state, updates, partial, final))
        return final

    def load_latest(self, state: RunState) -> Path:
        """Load the newest complete save into ``state``; damaged ones are skipped with a warning.

        Raises:
            UserError: there is none, it belongs to another backbone or to other experts or adapters.
        """
        path, meta = self._newest()
        if path is None:
            raise UserError(f"--resume: {self.folder} holds no complete save; start without --resume in a new folder")
        self._check_fits(path, meta, state)
        for expert in self.groups.hosted:
            shards = sharded_state(state.bank, state.optimizers, expert, meta["updates"][expert] > 0)
            loaded = dist_checkpointing.load(shards, str(path / SHARDED), validate_access_integrity=False)
            restore(state.bank, state.optimizers[expert], expert, loaded, meta["updates"][expert])
        state.step, state.updates = meta["step"], meta["updates"]
        state.best_accuracy, state.best_step, state.train_s = meta["best_accuracy"], meta["best_step"], meta["train_s"]
        if self.groups.is_main:
            log.info("resumed from %s (step %d)", path, state.step)
        return path

    def export_peft(self, state: RunState, policy: str, folder: Path) -> None:
        """Write one policy as a PEFT folder."""
        self._write_peft(state, policy, folder)

    def export_merged(self, state: RunState, policy: str, folder: Path) -> None:
        """Write one policy merged into dense weights, a Hugging Face directory."""
        factors = full_factors(state.bank, policy)
        self._main(lambda: save_merged(folder, self.backbone, factors, state.bank.scaling_of(policy), state.bank))

    def _write_peft(self, state: RunState, policy: str, folder: Path) -> None:
        factors = full_factors(state.bank, policy)
        invocation = self.encoder.invocation_token_ids if state.bank.config.scope == "completion" else None
        self._main(lambda: save_peft_adapter(folder, factors, state.bank.scaling_of(policy), state.bank,
                                             self.backbone, invocation))

    def _all_updates(self, state: RunState) -> dict[str, int]:
        mine = {expert: optimizer.updates for expert, optimizer in state.optimizers.items()}
        return {e: n for part in all_gather_objects(mine, self.groups.world) for e, n in part.items()}

    def _complete(self, state: RunState, updates: dict[str, int], partial: Path, final: Path) -> None:
        """The last file, then the rename that makes the save real."""
        bank = state.bank
        meta = {"step": state.step, "updates": updates, "best_accuracy": state.best_accuracy,
                "best_step": state.best_step, "train_s": state.train_s, "backbone_hash": self.backbone_hash,
                "adapter": bank.config.model_dump(mode="json"), "layout": self.groups.layout.key,
                "config": json.loads(state.config_json)}
        with open(partial / STATE, "w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(self.folder.glob("step_*"))[:-self.config.keep_last]:
            if _NAME.fullmatch(old.name):
                shutil.rmtree(old, ignore_errors=True)

    def _newest(self) -> tuple[Path | None, dict]:
        """Newest save whose files all have the hash they were written with; the same on every rank."""
        saves = []
        if self.groups.is_main and self.folder.is_dir():
            saves = sorted((p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)),
                           key=lambda p: int(_NAME.fullmatch(p.name)[1]), reverse=True)
        for path in broadcast_object(saves, 0, self.groups.world):
            meta = broadcast_object(_read_state(path) if self.groups.is_main else None, 0, self.groups.world)
            try:
                if isinstance(meta, str):
                    raise CheckpointingException(meta)
                verify_integrity_manifest(str(path / SHARDED))
                return path, meta
            except CheckpointingException as error:
                if self.groups.is_main:
                    log.warning("%s is damaged and was skipped (%s)", path, error)
        return None, {}

    def _check_fits(self, path: Path, meta: dict, state: RunState) -> None:
        if meta["backbone_hash"] != self.backbone_hash:
            raise UserError(f"model.path: {self.backbone} is not the backbone of {path}; a save only fits the backbone "
                            "it was trained on; give its directory")
        adapter = state.bank.config.model_dump(mode="json")
        changed = [key for key, value in adapter.items() if meta["adapter"].get(key) != value]
        if changed:
            raise UserError(f"adapter.{changed[0]}: {adapter[changed[0]]!r}; {path} has "
                            f"{meta['adapter'].get(changed[0])!r}; set it to that, or start a new run")
        experts = set(self.groups.placement.experts)
        if experts != set(meta["updates"]):
            raise UserError(f"experts: {sorted(experts)}; {path} has {sorted(meta['updates'])}; use the same experts")

    def _main(self, action) -> None:
        """Run on the main rank; its error reaches every rank."""
        self._everywhere(action if self.groups.is_main else (lambda: None), self.folder)

    def _everywhere(self, action, what: Path) -> None:
        """Run on every rank; if any fails to write, every rank raises the same error."""
        problem = None
        try:
            action()
        except (OSError, UserError) as error:
            problem = str(error)
        problems = [p for p in all_gather_objects(problem, self.groups.world) if p]
        if problems:
            raise UserError(problems[0] if "; " in problems[0] else
                            f"{what}: could not be written ({problems[0]}); free space or mend the disk; "
                            "earlier saves are whole")
        dist.barrier(self.groups.world)


def _read_state(path: Path) -> dict | str:
    """state.json of a save, or why it cannot be read."""
    try:
        return json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        return f"{STATE}: {error}"


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
