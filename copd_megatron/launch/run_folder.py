"""The run folder as the command line sees it: may a run start here, who started it, how is it read back.

``run.json`` names the recipe; that lets ``copd eval RUN`` resolve names of modules that lie beside it.
"""

from __future__ import annotations

import json
from pathlib import Path

from copd_megatron.config.loading import add_import_folder, load_config
from copd_megatron.config.run import RunConfig
from copd_megatron.types import UserError


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


def config_of(run_dir: Path) -> RunConfig:
    """The configuration a run was started with; its recipe's folder becomes importable, as it was then."""
    info = run_dir / "run.json"
    if info.exists():
        add_import_folder(Path(json.loads(info.read_text())["recipe"]).parent)
    return load_config(run_dir / "config.json")
