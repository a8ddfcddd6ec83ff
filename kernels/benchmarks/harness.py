"""What all kernel benchmarks share: agreement first, then time, share of the roofline, and a row in a CSV file.

The roofline is measured in the same run: the rate of copies in memory and that of a large matrix product in the case's
dtype. What must be read and written at least, and multiplied at least, takes

    max(bytes / copy rate, flops / matrix rate) seconds

and the share is that over the time taken (Williams et al. 2009, doi:10.1145/1498765.1498785). Times are medians of runs
on data that the caches do not hold, by CUDA events.
"""
from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("kernel", "shape", "dtype", "backend", "seconds", "bytes", "flops", "roofline_share", "gpu", "driver",
           "torch", "triton", "commit", "date")
REPEATS = 30
CACHE_BYTES = 256 << 20
"""Written between runs: more than any cache holds."""
MATRIX = 8192
"""Rows and columns of the product that measures the matrix rate."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest distance of two sides' results, as a share of their norm."""


@dataclass(frozen=True)
class Case:
    """One operation on one set of tensors, done by several sides."""

    shape: str
    """Example: "T=1024 V=128256 k=64"."""
    dtype: torch.dtype
    sides: dict[str, Callable[[], Sequence[Tensor]]]
    """Backend -> one call, which returns what must agree; the first side is what the others are compared with."""
    bytes: int
    """Read from memory and written there, at least."""
    flops: int
    """Of matrix products, at least; 0 where there are none."""


def sides(work: Callable[[Any], Sequence[Tensor]], **forms: Any) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """``Case.sides`` of one piece of work done with each of several modules or functions."""
    return {name: partial(work, form) for name, form in forms.items()}


@dataclass(frozen=True)
class Roofline:
    """What this machine reaches at most."""

    bytes_per_s: float
    flops_per_s: dict[torch.dtype, float]

    def share(self, case: Case, seconds: float) -> float:
        """Of the time that memory or matrix units need at least, in the time taken."""
        return max(case.bytes / self.bytes_per_s, case.flops / self.flops_per_s[case.dtype]) / seconds

    @classmethod
    def measure(cls, dtypes: Iterable[torch.dtype]) -> Roofline:
        """On the current CUDA device."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        rate = 2 * source.numel() / seconds_of(lambda: target.copy_(source))
        return cls(rate, {dtype: _matrix_rate(dtype) for dtype in dtypes})


def _matrix_rate(dtype: torch.dtype) -> float:
    left, right = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * MATRIX ** 3 / seconds_of(lambda: left @ right)


def seconds_of(work: Callable[[], object]) -> float:
    """Median over ``REPEATS`` runs on the current CUDA device, each with cold caches; the first three do not count."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for number in range(REPEATS + 3):
        cache.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


def agree(case: Case) -> float:
    """Largest distance of any side to the first. Raises ArithmeticError above the tolerance."""
    (name, first), *others = case.sides.items()
    wanted, worst = [x.detach().double() for x in first() if x is not None], 0.0
    for other, work in others:
        results = [x for x in work() if x is not None]
        for number, (found, want) in enumerate(zip(results, wanted, strict=True)):
            distance = float((found.detach().double() - want).norm() / want.norm().clamp_min(1e-12))
            worst = max(worst, distance)
            if not distance <= TOLERANCE[case.dtype]:
                raise ArithmeticError(f"{case.shape}: result {number} of {other} is {distance:.1e} of its norm away "
                                      f"from {name}'s; at most {TOLERANCE[case.dtype]:.0e}")
    return worst


def measure(kernel: str, case: Case, roofline: Roofline, where: dict[str, str]) -> list[dict[str, object]]:
    """One row per side."""
    rows = []
    for backend, work in case.sides.items():
        seconds = seconds_of(work)
        rows.append({"kernel": kernel, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."),
                     "backend": backend, "seconds": seconds, "bytes": case.bytes, "flops": case.flops,
                     "roofline_share": round(roofline.share(case, seconds), 4), **where})
    return rows


def machine() -> dict[str, str]:
    """GPU, versions, commit and date of the rows measured now."""
    import triton

    changed = _told("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    commit = _told("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD") or "unknown"
    driver = _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {"gpu": torch.cuda.get_device_name(), "driver": driver[0] if driver else "unknown",
            "torch": torch.__version__, "triton": triton.__version__,
            "commit": commit + ("-changed" if changed else ""), "date": time.strftime("%Y-%m-%d")}


def _told(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""


def append(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Add rows below those of a CSV file, or begin one. Raises ValueError if its columns are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text() if path.exists() else ",".join(COLUMNS) + "\n"
    if old.splitlines()[0] != ",".join(COLUMNS):
        raise ValueError(f"{path}: columns {old.splitlines()[0]}; {','.join(COLUMNS)}; move the file away")
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        file.write(old)
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)
    part.replace(path)


def main(kernel: str, cases: Callable[[bool, torch.device], Iterable[Case]], arguments: Sequence[str] | None = None
         ) -> int:
    """The command line of a benchmark. 0; 1 when sides disagree; 2 when this machine cannot run it.

    Args:
        cases: (small, device) -> cases. Small ones are float32, and small enough for Triton's interpreter.
    """
    parser = argparse.ArgumentParser(description=f"Agreement, time and share of the roofline of {kernel}.")
    parser.add_argument("--check", action="store_true",
                        help="small sizes, agreement only; without a GPU in Triton's interpreter")
    parser.add_argument("--csv", type=Path, default=RESULTS / f"{kernel}.csv", metavar="FILE",
                        help="append the rows there (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        if not options.check:
            print(f"error: benchmarks: no CUDA device; times are those of a GPU; run {kernel}.py on one, or with "
                  "--check for agreement alone", file=sys.stderr)
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for case in cases(True, device):
            print(f"{kernel} {case.shape} {case.dtype}: {', '.join(case.sides)} agree within {agree(case):.1e}",
                  flush=True)
        if not options.check:
            _benchmark(kernel, cases, device, options.csv)
    except (ArithmeticError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    return 0


def _benchmark(kernel: str, cases: Callable[[bool, torch.device], Iterable[Case]], device: torch.device, path: Path
               ) -> None:
    """Each case is written as soon as it is measured."""
    where, limits = machine(), Roofline.measure(TOLERANCE)
    print(f"{where['gpu']}, driver {where['driver']}, torch {where['torch']}, triton {where['triton']}: copies "
          f"{limits.bytes_per_s / 1e12:.2f} TB/s, products "
          + ", ".join(f"{rate / 1e12:.0f} TFLOP/s ({dtype})" for dtype, rate in limits.flops_per_s.items()))
    for case in cases(False, device):
        distance = agree(case)
        rows = measure(kernel, case, limits, where)
        append(path, rows)
        for row in rows:
            print(f"{kernel} {row['shape']:<48} {row['dtype']:<9} {row['backend']:<10} {row['seconds'] * 1e3:9.3f} ms "
                  f"{row['roofline_share']:7.1%} of the roofline, agreement {distance:.1e}", flush=True)
    print(f"written: {path}")
