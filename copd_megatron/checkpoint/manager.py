"""Saves that are whole or absent, and exports: written to a temporary name, renamed, the oldest removed.

checkpoints/step_000012/
    state.json          step, updates per expert, best evaluation, backbone hash, resolved config, and the
                        SHA-256 of itself and of every file that a resume reads
    sharded/            Megatron dist_checkpointing: adapters and Adam moments
    adapters/<policy>/  PEFT folders of every expert and of the merged policy
"""
from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from copd_megatron.checkpoint import whole_folder
from copd_megatron.checkpoint.huggingface import save_merged
from copd_megatron.checkpoint.peft import full_factors, save_peft_adapter
from copd_megatron.checkpoint.sharded import Optimizer, read_shards, write_shards
from copd_megatron.config.checkpoint import CheckpointConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.safetensor_reader import content_hash
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.collectives import all_gather_objects, broadcast_object
from copd_megatron.parallel.groups import Groups
from copd_megatron.types import UserError

log = logging.getLogger(__name__)
STATE, SHARDED = "state.json", "sharded"
_NAME = re.compile(r"step_(\d{6,})")


class Stateful(Protocol):
    """Something whose state is plain data."""

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""


@dataclass
class RunState:
    """What a run is made of between two steps."""

    bank: AdapterBank
    optimizers: dict[str, Optimizer]
    """Of the hosted experts."""
    config_json: str
    schedule: Stateful | None = None
    """What decides phases and edges; None: not of interest."""
    step: int = 0
    best_accuracy: float = -1.0
    best_step: int = 0
    train_s: float = 0.0
    """Seconds trained before this start."""
    updates: dict[str, int] = field(default_factory=dict)
    """Updates per expert, all experts; filled by saving and loading."""
    started: float = field(default_factory=time.monotonic)
    """When this start began, on the monotonic clock."""


class CheckpointManager:
    """Saves, loads and exports. Every rank calls every method; the main rank writes single files."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, groups: Groups, backbone: Path,
                 encoder: PromptEncoder):
        self.folder, self.config, self.groups = run_dir / "checkpoints", config, groups
        self.backbone, self.encoder = backbone, encoder
        self.prefix = TEXT_PREFIX[encoder.spec.family]
        self.backbone_hash = content_hash(backbone)

    def save(self, state: RunState, policies: Sequence[str]) -> Path:
        """Save the run and PEFT folders of ``policies``, which every replica holds at this moment.

        Returns:
            The folder of the save; older ones beyond ``keep_last`` are gone.

        Raises:
            UserError: on every rank, if any rank could not write; earlier saves are untouched.
        """
        final = self.folder / f"step_{state.step:06d}"
        partial = final.with_name(final.name + ".tmp")
        state.updates = self._all_updates(state)
        try:
            self._on_main(final, lambda: whole_folder.begin(final))
            self._everywhere(final, lambda: write_shards(partial / SHARDED, state.bank, state.optimizers,
                                                         state.updates, self.groups.world))
            for policy in policies:
                self.export_peft(state, policy, partial / "adapters" / policy)
            self._on_main(final, lambda: self._complete(state, partial, final))
        except UserError:
            self._on_main(final, lambda: whole_folder.discard(partial))
            raise
        return final

    def load_latest(self, state: RunState) -> Path:
        """Load the newest complete save into ``state``; damaged ones are skipped with a warning.

        Raises:
            UserError: there is none, or it belongs to another backbone, other experts or other adapters.
        """
        found = broadcast_object(self._newest() if self.groups.is_main else None, 0, self.groups.world)
        if found is None:
            raise UserError(f"--resume: {self.folder} holds no complete save; a run resumes from one; start "
                            "without --resume in a new folder")
        path, meta = found
        self._check_fits(path, meta, state)
        read_shards(path / SHARDED, state.bank, state.optimizers, meta["updates"])
        state.step, state.updates, state.train_s = meta["step"], meta["updates"], meta["train_s"]
        state.best_accuracy, state.best_step = meta["best_accuracy"], meta["best_step"]
        if state.schedule is not None:
            state.schedule.load_state(meta["schedule"])
        if self.groups.is_main:
            log.info("resumed from %s (step %d)", path, state.step)
        return path

    def export_peft(self, state: RunState, policy: str, folder: Path) -> None:
        """Write one policy, which the main rank's replica holds, as a PEFT folder."""
        factors, scaling = self._full_factors(state.bank, policy), state.bank.scaling_of(policy)
        invocation = self.encoder.invocation_token_ids if state.bank.config.scope == "completion" else None
        self._on_main(folder, lambda: save_peft_adapter(folder, factors, scaling, self.prefix, self.backbone,
                                                        invocation))

    def export_merged(self, state: RunState, policy: str, folder: Path) -> None:
        """Write one policy, which the main rank's replica holds, merged into dense weights.

        The result is a Hugging Face directory.

        Raises:
            UserError: scope ``completion``, whose adapted span depends on the prompt; or the disk refuses.
        """
        if state.bank.config.scope == "completion":
            raise UserError("adapter.scope: completion never merges into dense weights, because the prompt "
                            "is not adapted; allowed is sequence; use the PEFT folders of each save (activated "
                            "LoRA), or train with adapter.scope=sequence")
        factors, scaling = self._full_factors(state.bank, policy), state.bank.scaling_of(policy)
        self._on_main(folder, lambda: save_merged(folder, self.backbone, factors, scaling, self.prefix))

    def _full_factors(self, bank: AdapterBank, policy: str) -> dict:
        """On the main rank; other replicas have nothing to do."""
        return full_factors(bank, policy) if self.groups.coords.replica == 0 else {}

    def _all_updates(self, state: RunState) -> dict[str, int]:
        mine = {expert: optimizer.updates for expert, optimizer in state.optimizers.items()}
        return {e: n for part in all_gather_objects(mine, self.groups.world) for e, n in part.items()}

    def _complete(self, state: RunState, partial: Path, final: Path) -> None:
        """The last file, then the rename that makes the save real."""
        meta = {"step": state.step, "updates": state.updates, "best_accuracy": state.best_accuracy,
                "best_step": state.best_step, "train_s": state.train_s + time.monotonic() - state.started,
                "backbone_hash": self.backbone_hash, "adapter": state.bank.config.model_dump(mode="json"),
                "schedule": {} if state.schedule is None else state.schedule.state(),
                "layout": self.groups.layout.key, "config": json.loads(state.config_json),
                "files": {file.name: _sha256(file) for file in sorted((partial / SHARDED).iterdir())}}
        (partial / STATE).write_text(json.dumps({"sha256": _digest(meta), **meta}, indent=1) + "\n")
        whole_folder.finish(partial, final)
        self._prune(state.step)

    def _prune(self, step: int) -> None:
        """Remove what crashes left behind and all but the newest saves up to ``step``.

        Later saves do not count: they can only be damaged ones that a resume skipped.
        """
        for leftover in self.folder.glob("step_*.tmp"):
            whole_folder.discard(leftover)
        for _, old in [(s, path) for s, path in self._saves() if s <= step][self.config.keep_last:]:
            try:
                whole_folder.remove(old)
            except OSError as error:
                log.warning("%s is no longer needed but cannot be removed (%s)", old, error)

    def _saves(self) -> list[tuple[int, Path]]:
        """(step, folder) of everything that is named like a save, newest first."""
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(((int(m[1]), f) for f in folders if (m := _NAME.fullmatch(f.name))), reverse=True)

    def _newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Newest save whose files all have the hashes they were written with."""
        for _, path in self._saves():
            try:
                return path, _verified_state(path)
            except (OSError, ValueError) as error:
                log.warning("%s is damaged and was skipped (%s)", path, error)
        return None

    def _check_fits(self, path: Path, meta: dict[str, Any], state: RunState) -> None:
        if meta["backbone_hash"] != self.backbone_hash:
            raise UserError(f"model.path: {self.backbone} is not the backbone of {path}; a save only fits "
                            "the backbone it was trained on; give its directory")
        adapter = state.bank.config.model_dump(mode="json")
        changed = [key for key, value in adapter.items() if meta["adapter"].get(key) != value]
        if changed:
            raise UserError(f"adapter.{changed[0]}: {adapter[changed[0]]!r}; {path} has "
                            f"{meta['adapter'].get(changed[0])!r}; set it to that, or start a new run")
        experts = set(self.groups.placement.experts)
        if experts != set(meta["updates"]):
            raise UserError(f"experts: {sorted(experts)}; {path} has {sorted(meta['updates'])}; use the same "
                            "experts, or start a new run")

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


def _verified_state(path: Path) -> dict[str, Any]:
    """state.json of a save whose files are all intact; OSError or ValueError says what is wrong."""
    meta = json.loads((path / STATE).read_text())
    if not isinstance(meta, dict) or meta.pop("sha256", None) != _digest(meta):
        raise ValueError(f"{STATE} is corrupt")
    for name, written in meta["files"].items():
        if _sha256(path / SHARDED / name) != written:
            raise ValueError(f"{SHARDED}/{name} is corrupt")
    return meta


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
