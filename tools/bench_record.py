"""What benchmarks share: a check of their arguments, clock and memory, the machine, the file they write, and how they
end."""
from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from copd_megatron.checkpoint.peak_memory import PeakMemory

Result = TypeVar("Result")


def refuse_below(parser: argparse.ArgumentParser, options: argparse.Namespace, **least: int) -> None:
    """End the program with one line if an option (or the lowest of a list) is less than its ``least``."""
    for name, bound in least.items():
        given = getattr(options, name)
        lowest = min(given, default=bound) if isinstance(given, list) else given
        if lowest < bound:
            parser.error(f"--{name.replace('_', '-')}: {lowest}; at least {bound}")


def add_json_option(parser: argparse.ArgumentParser, text: str) -> None:
    """``--json FILE`` for `save_json`. Whether the file can be written is known before anything is measured."""
    parser.add_argument("--json", type=writable, metavar="FILE", help=text)


def writable(name: str) -> Path:
    """A file that can be written, in a folder that is made if it is missing; a type of argparse's."""
    file = Path(name)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder; a file to write")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            return file
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error.strerror} ({file.parent}); a file in a folder that can be "
                                         "written") from error


def end(main: Callable[[], int]) -> NoReturn:
    """Run a tool and leave the process with its exit code: 130 when it is interrupted, 2 where memory runs out, a line
    each."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("\ninterrupted; what --json saves row by row is there", file=sys.stderr)
        code = 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(f"error: memory is out: {(str(error) or 'MemoryError').splitlines()[0]}; smaller sizes", file=sys.stderr)
        code = 2
    sys.exit(code)


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


def free_bytes() -> int:
    """Memory of the device that this process can still take: on a GPU with what torch keeps for later."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024


def save_json(file: Path | None, content: dict[str, Any], where: dict, options: argparse.Namespace) -> None:
    """Write what was found so far with machine and arguments, in place of what is there; nothing without a file."""
    if file is None:
        return
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(content | {"machine": where, "arguments": given}, indent=1) + "\n")
    new.replace(file)
