"""The run folder as the command line sees it: may a run start here, who started it, how is it read back.

``launch.json`` holds one record per start (recipe, overrides, version); it is what lets ``copd eval RUN``
resolve names of modules that lie beside the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from copd_megatron import __version__
from copd_megatron.config.loading import add_import_folder, load_config
from copd_megatron.config.run import RunConfig
from copd_megatron.types import UserError

LAUNCHES = "launch.json"


def check_startable(run_dir: Path, resume: bool) -> None:
    """Refuse to write over a run, and to resume where there is none.

    Raises:
        UserError: with the two ways out.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"--run-dir: {run_dir} is a file; a folder is needed; name another one")
    if resume and not holds_run(run_dir):
        raise UserError(
            f"--resume: {run_dir} holds no run; a folder in which a run was started; check --run-dir, "
            "or start without --resume"
        )
    if not resume and holds_run(run_dir):
        raise UserError(
            f"--run-dir: {run_dir} holds a run already; a new folder, or --resume to go on with it; "
            f"look at it with `copd report {run_dir}`"
        )


def holds_run(run_dir: Path) -> bool:
    """Whether a run has left anything behind there that a new one would mix with."""
    return any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints", "summary.json"))


def existing_run(folder: str | Path) -> Path:
    """``folder`` as a path, if a run wrote it.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    run_dir = Path(folder)
    if not run_dir.is_dir():
        raise UserError(f"run: {run_dir} does not exist; a folder that `copd train` wrote; check the path")
    if not (run_dir / "config.json").exists() and not holds_run(run_dir):
        raise UserError(f"run: {run_dir} holds no run; a folder that `copd train` wrote; check the path")
    return run_dir


def record_launch(run_dir: Path, recipe: str | Path, overrides: Sequence[str]) -> None:
    """Append this start to ``launch.json``."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "recipe": str(Path(recipe).resolve()),
        "overrides": list(overrides),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / LAUNCHES).write_text(json.dumps([*_launches(run_dir), record], indent=2) + "\n")


def _launches(run_dir: Path) -> list[dict]:
    file = run_dir / LAUNCHES
    return json.loads(file.read_text()) if file.exists() else []


def config_of(run_dir: Path) -> RunConfig:
    """The configuration a run was started with; its recipe's folder becomes importable, as it was then."""
    for launch in _launches(run_dir)[-1:]:
        add_import_folder(Path(launch["recipe"]).parent)
    return load_config(run_dir / "config.json")
