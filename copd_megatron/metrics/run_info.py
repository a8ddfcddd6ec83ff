"""What a run was started with, for people who read it later: ``run.json`` beside ``config.json``."""
from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from copd_megatron.metrics.sinks import replace_file

PACKAGES = ("copd_megatron", "torch", "megatron-core", "transformers", "peft", "transformer-engine", "vllm",
            "numpy")
"""Packages whose versions a report shows when they are installed."""


def package_versions() -> dict[str, str]:
    """Python and the installed ones of ``PACKAGES`` with their versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_run_info(run_dir: Path, *, recipe: str, arguments: Sequence[str], world_size: int, device: str,
                   resume_step: int | None = None) -> None:
    """Write or continue ``run.json``: {"recipe", "versions", "starts": [one per start or resume]}.

    ``device`` is a word for people, e.g. "8 x NVIDIA H100" or "cpu, 2 cores".
    """
    path = run_dir / "run.json"
    starts = json.loads(path.read_text())["starts"] if resume_step is not None and path.exists() else []
    starts.append({"time": round(time.time(), 3), "step": resume_step or 0, "arguments": list(arguments),
                   "world_size": world_size, "device": device})
    info = {"recipe": recipe, "versions": package_versions(), "starts": starts}
    run_dir.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(info, indent=1).encode())
