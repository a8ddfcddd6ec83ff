"""What benchmarks share: a check of their arguments, clock and memory, the machine, and the file they write."""
from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from copd_megatron.checkpoint.peak_memory import PeakMemory

Result = TypeVar("Result")


def refuse_below(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """End the program with one line if an option (or the lowest of a list) is less than its ``least``."""
    for name, bound in least.items():
        given = getattr(options, name)
        lowest = min(given) if isinstance(given, list) else given
        if lowest < bound:
            parser.error(f"--{name.replace('_', '-')}: {lowest}; at least {bound}")


def machine() -> dict[str, Any]:
    """Where this runs, and how busy it is."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in (info.read_text().splitlines() if info.exists() else [])
             if line.startswith("model name")]
    return {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "torch": torch.__version__,
            "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}


def now() -> float:
    """Seconds on a clock, once the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_of(work: Callable[[], Result]) -> tuple[Result, int]:
    """What the work returned, and the most bytes it held beyond what was there before: the allocator's count on a GPU,
    resident pages on a CPU (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value = work()
        return value, torch.cuda.max_memory_allocated() - before
    with PeakMemory() as peak:
        value = work()
    return value, peak.peak_bytes


def save_json(file: Path | None, content: dict[str, Any], where: dict, options: argparse.Namespace) -> None:
    """Write what was found so far with machine and arguments, in place of what is there; nothing without a file."""
    if file is None:
        return
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(content | {"machine": where, "arguments": given}, indent=1) + "\n")
    new.replace(file)
