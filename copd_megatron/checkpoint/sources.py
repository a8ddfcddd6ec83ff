"""Where a conversion takes policies from: PEFT folders, or the experts of a run's saves; and how they become one."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from copd_megatron.checkpoint.adapter import Adapter, Truncation, combined, merge_weights
from copd_megatron.checkpoint.content import backbone_hash
from copd_megatron.checkpoint.peft import CONFIG, read_peft_adapter
from copd_megatron.checkpoint.saves import ADAPTERS, whole_save
from copd_megatron.config.trainer import MergeConfig
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.types import UserError

Which = int | Literal["newest", "best"]
MERGED = "merged"
"""A run's experts as one policy."""


@dataclass(frozen=True)
class RunSave:
    """One save of a run, as a conversion reads it."""

    folder: Path
    """checkpoints/step_N"""
    step: int
    experts: tuple[str, ...]
    backbone: Path
    """As the run's configuration names it."""
    merge: MergeConfig
    backbone_hash: str

    def check_backbone(self, backbone: Path) -> None:
        """Refuse weights that the run was not trained on, however their files are cut. Reads them, unless their sums
        are remembered.

        Raises:
            UserError: it is another backbone.
        """
        if backbone_hash(backbone, None) != self.backbone_hash:
            raise UserError(f"--backbone: {backbone} is not the backbone of {self.folder}; adapters only fit the "
                            "weights they were trained on; give its directory")

    def adapter_of(self, policy: str, spec: BackboneSpec) -> Adapter:
        """One expert, or the run's own merged policy.

        Raises:
            UserError: there is no such policy.
        """
        if policy not in (*self.experts, MERGED):
            raise UserError(f"--policy: {policy!r} is no policy of {self.folder}; allowed are "
                            f"{', '.join((*self.experts, MERGED))}; choose one")
        return read_peft_adapter(self.folder / ADAPTERS / policy, spec)


def open_run(run_dir: Path, which: Which = "newest") -> RunSave:
    """The save of a run that is asked for, its files intact.

    Args:
        which: the newest whole save, that of the best evaluation so far, or that of a step.

    Raises:
        UserError: there is none; says what there is.
    """
    folder = run_dir / "checkpoints"
    found = whole_save(folder)
    if found is None:
        raise UserError(f"--run: {run_dir} holds no complete save; a folder that `copd train` wrote, after its first "
                        "save; check the path")
    if which != "newest":
        step = found[1]["best_step"] if which == "best" else which
        found = whole_save(folder, step)
    if found is None:
        best = which == "best" and (run_dir / "best" / CONFIG).is_file()
        way = f"give its merged policy, {run_dir / 'best'}, to --adapters" if best else "take --step newest"
        raise UserError(f"--step: {run_dir} has no complete save of step {step}; checkpoint.keep_last and "
                        f"keep_every say which stay; {way}")
    path, meta = found
    config = meta["config"]
    return RunSave(path, meta["step"], tuple(meta["updates"]), Path(config["model"]["path"]),
                   MergeConfig.model_validate(config["merge"]), meta["backbone_hash"])


def read_adapters(folders: Sequence[Path], spec: BackboneSpec) -> dict[str, Adapter]:
    """PEFT folders by their own names.

    Raises:
        UserError: one is broken or does not fit the backbone, or two have one name.
    """
    adapters: dict[str, Adapter] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in adapters:
            raise UserError(f"--adapters: two folders are called {name!r}; weights go by folder names; rename one")
        adapters[name] = read_peft_adapter(folder, spec)
    return adapters


@dataclass(frozen=True)
class Merge:
    """Several policies as one, and how that came about."""

    adapter: Adapter
    weights: dict[str, float]
    truncation: Truncation | None = None

    def about(self) -> dict[str, Any]:
        """For merge.json: factor per policy and, once all factors were asked for, what a truncation lost."""
        noted: dict[str, Any] = {"weights": self.weights}
        if self.truncation:
            error, worst, module = self.truncation.error()
            noted |= {"rank": self.truncation.rank, "relative_error": error,
                      "worst_relative_error": worst, "worst_module": module}
        return noted


def merge(adapters: Mapping[str, Adapter], config: MergeConfig, rank: int | None = None) -> Merge:
    """One policy: the sum that ``config`` says, cut to ``rank`` if one is given."""
    weights = merge_weights(list(adapters), config)
    one = next(iter(adapters.values()))
    # An adapter alone stays as it is, scaling included.
    alone = list(weights.values()) == [1.0]
    adapter = one if alone else combined(list(adapters.values()), list(weights.values()))
    if rank is None:
        return Merge(adapter, weights)
    truncation = Truncation(adapter, rank)
    return Merge(truncation.adapter, weights, truncation)


