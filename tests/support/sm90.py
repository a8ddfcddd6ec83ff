"""Triton kernels compiled for sm_90 where there is no GPU: what the host code would launch is compiled, not run.

    PYTHONPATH=kernels python tests/support/sm90.py "prefix_attention 128 bfloat16" vocab_topk

prints one JSON object per kernel compiled: job, kernel, registers and stack (bytes that registers were spilled to) per
thread, shared (bytes per block), warps, and wgmma: whether it has Hopper's matrix instructions. No name: all jobs. It
is a program because a process either interprets kernels or compiles them. Calls go through each kernel's own host
function on CPU tensors, so constants and numbers of warps are those of real launches. Triton's cache keeps what was
compiled.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SM90 = GPUTarget("cuda", 90, 32)


class _NoDevice:
    """What compiling asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return SM90

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(record: Callable[[str, Any], None]) -> Iterator[None]:
    """Launches compile for sm_90 and report (name, compiled kernel); nothing runs, results are what memory held."""
    run = JITFunction.run

    def instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        record(self.__name__, kernel)
        return kernel

    driver.set_active(_NoDevice())
    JITFunction.run = instead
    try:
        yield
    finally:
        JITFunction.run = run


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack per thread, as the assembler counted them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True,
                              text=True).stdout
    return {name: int(re.search(rf"\b{word}:(\d+)", text).group(1))
            for name, word in (("registers", "REG"), ("stack", "STACK"))}


def prefix_attention(dim: int, dtype: torch.dtype) -> None:
    """Forward and backward."""
    from copd_kernels.prefix_attention.plan import Plan
    from copd_kernels.prefix_attention.triton_impl import prefix_attention as attend

    q, k, v = (torch.zeros(5, heads, dim, dtype=dtype, requires_grad=True) for heads in (8, 2, 2))
    attend(q, k, v, Plan.build([(0, 3, 0, 0), (3, 5, 0, 3)], 5, q.device)).sum().backward()


def vocab_topk() -> None:
    """The top 64 of a whole vocabulary, and the sampled token's logit."""
    from copd_kernels.vocab_topk import triton_impl

    triton_impl.vocab_topk(torch.zeros(1, 128256), 64, torch.zeros(1, 1, dtype=torch.int64))


def topk_kl() -> None:
    """The divergence whose kernel is longest."""
    from copd_kernels.topk_kl import triton_impl

    student, teacher = (torch.zeros(1, 64) for _ in range(2))
    triton_impl.topk_divergence(student, teacher, student[:, 0], "jsd")


def linear_logprob(ids: int) -> None:
    """Forward, with and without what a backward needs, and both backwards, with entropy and from what was kept."""
    from copd_kernels.linear_logprob import triton_impl

    hidden, ids_TK = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(2, ids, dtype=torch.int64)
    head, one, each = torch.zeros(5000, 16, dtype=torch.bfloat16), torch.zeros(2), torch.zeros(2, ids)
    triton_impl.linear_logprob(hidden, head, ids_TK, 1.0, True, True)
    triton_impl.linear_logprob_backward(hidden, head, ids_TK, 1.0, one, each, one, one)
    triton_impl.picked_gradient(hidden.float(), head, ids_TK, each, each, 1.0)


def grouped_lora(rows: int) -> None:
    """Both products, and a factor's gradient; of many rows each program has a share."""
    from copd_kernels.grouped_lora import triton_impl
    from copd_kernels.grouped_lora.segments import Segments

    x, segments = torch.zeros(rows, 256, dtype=torch.bfloat16), Segments.build([slice(0, rows)], torch.device("cpu"))
    down, up = torch.zeros(32, 256, requires_grad=True), torch.zeros(256, 32, requires_grad=True)
    h = triton_impl.grouped_down(x, [down], segments)
    triton_impl.grouped_up(x.clone(), h, [up], [1.0], segments).sum().backward()


def rowwise_fp8() -> None:
    """Rows that fit in registers, multiplied, and rows that do not."""
    from copd_kernels.rowwise_fp8 import triton_impl

    for size in (2560, 9728):
        triton_impl.quantise_rows(torch.zeros(1, size, dtype=torch.bfloat16), torch.zeros(size))


JOBS: dict[str, Callable[[], None]] = {
    "vocab_topk": vocab_topk, "topk_kl": topk_kl, "linear_logprob": partial(linear_logprob, 1),
    "linear_logprob 257": partial(linear_logprob, 257), "grouped_lora": partial(grouped_lora, 4),
    "grouped_lora 1024": partial(grouped_lora, 1024), "rowwise_fp8": rowwise_fp8} | {
    f"prefix_attention {dim} {str(dtype).removeprefix('torch.')}": partial(prefix_attention, dim, dtype)
    for dim, dtype in ((128, torch.bfloat16), (64, torch.bfloat16), (96, torch.bfloat16), (256, torch.bfloat16),
                       (128, torch.float32))}


def main(names: list[str]) -> None:
    """Compile the named jobs, or all."""
    for job in names or JOBS:
        seen = set()

        def record(name: str, kernel: Any, job: str = job, seen: set = seen) -> None:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                found = {"job": job, "kernel": name, **resources(kernel.asm["cubin"]),
                         "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
                         "wgmma": "wgmma" in kernel.asm["ptx"]}
                print(json.dumps(found), flush=True)

        with compiling(record):
            JOBS[job]()


if __name__ == "__main__":
    main(sys.argv[1:])
