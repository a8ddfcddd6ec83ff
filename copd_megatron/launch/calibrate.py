"""``copd calibrate``: what this machine's ranks reach, measured in about a minute, as ``copd plan`` reads it.

Every number is the best of several repetitions on the slowest rank. Collectives are measured where there are ranks to
talk to: within a node when several of them share one, between nodes when there are several; what cannot be measured
is taken from the built-in hardware that is most alike, and noted.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from copd_megatron.config.parallel import ParallelConfig
from copd_megatron.parallel.collectives import all_gather_objects, reduce_scalars
from copd_megatron.parallel.groups import init_distributed
from copd_megatron.platform import device
from copd_megatron.simulate.hardware import BUILT_IN, DTYPES, Hardware

SECONDS = 2.0
"""Spent on each measurement."""


def measure(seconds: float | None = None) -> Hardware:
    """Measure on all ranks together; every rank gets the same answer.

    Args:
        seconds: spent on each of about a dozen measurements; None for `SECONDS`.
    """
    seconds = SECONDS if seconds is None else seconds
    init_distributed(ParallelConfig())
    world = dist.group.WORLD
    where, like = device(), most_alike()
    cuda = where.type == "cuda"
    flops = {dtype: _matmul_flops(getattr(torch, dtype), where, seconds) for dtype in DTYPES}
    # Every rank at once, as in training: ranks of one machine share its memory and its caches.
    local = {f"flops {dtype}": value for dtype, value in flops.items()}
    local["attention"] = min(1.0, _attention_flops(where, seconds) / flops[_attention_dtype(where)])
    local["bandwidth"] = _memory_bandwidth(where, seconds)
    slowest = reduce_scalars(local, world, "min")
    hosts = all_gather_objects(socket.gethostname(), world)
    per_node = max(hosts.count(host) for host in hosts)
    memory = torch.cuda.get_device_properties(where).total_memory if cuda else _host_memory() / per_node
    name = torch.cuda.get_device_name(where).lower().replace(" ", "-") if cuda else "cpu-measured"
    measured = replace(
        like, name=name, memory_bytes=reduce_scalars({"m": memory}, world, "min")["m"],
        peak_flops={dtype: slowest[f"flops {dtype}"] for dtype in DTYPES}, achieved=dict.fromkeys(DTYPES, 1.0),
        memory_bandwidth=slowest["bandwidth"], attention_achieved=slowest["attention"],
        operation_s=reduce_scalars({"s": _operation_s(where, seconds)}, world, "max")["s"],
        ranks_per_node=per_node if len(set(hosts)) > 1 or not cuda else torch.cuda.device_count(),
        notes={"measured": "matrix products, attention, memory, launches"})
    return _with_collectives(measured, hosts, where, seconds)


def summary(hardware: Hardware) -> str:
    """What was measured, in a few lines."""
    rates = ", ".join(f"{dtype} {hardware.flops(dtype) / 1e12:.3g}" for dtype in hardware.peak_flops)
    return "\n".join([
        f"{hardware.name}: {hardware.memory_bytes / 1e9:.3g} GB, {hardware.ranks_per_node} ranks per node",
        f"matrix products, TFLOP/s: {rates}; attention at {hardware.attention_achieved:.0%}",
        f"memory {hardware.memory_bandwidth / 1e9:.3g} GB/s; an operation launches in "
        f"{hardware.operation_s * 1e6:.3g} us",
        f"collectives within a node {hardware.intra_node_bandwidth / 1e9:.3g} GB/s, "
        f"{hardware.intra_node_latency_s * 1e6:.3g} us; between nodes {hardware.inter_node_bandwidth / 1e9:.3g} GB/s, "
        f"{hardware.inter_node_latency_s * 1e6:.3g} us",
        *(f"{what}: {text}" for what, text in hardware.notes.items())])


def most_alike() -> Hardware:
    """The built-in hardware that this device's name contains, h100 for other GPUs."""
    if not torch.cuda.is_available():
        return BUILT_IN["cpu"]
    name = torch.cuda.get_device_name().lower()
    return next((hardware for key, hardware in BUILT_IN.items() if key in name), BUILT_IN["h100"])


def _best_s(work: Callable[[], object], seconds: float) -> float:
    """Shortest time of one call; ``work`` is repeated for about ``seconds``, once at least after a warm-up."""
    def timed() -> float:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed()
    end, best = time.perf_counter() + seconds, timed()
    while time.perf_counter() < end:
        best = min(best, timed())
    return best


def _matmul_flops(dtype: torch.dtype, where: torch.device, seconds: float) -> float:
    """Of square matrices, as large as one product in a tenth of ``seconds`` allows: some CPUs emulate bfloat16."""
    size, largest = (8192, 8192) if where.type == "cuda" else (128, 1024)
    while True:
        a, b = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
        best = _best_s(partial(torch.mm, a, b), 0.0)
        if size >= largest or best > seconds / 80:  # twice the size takes eight times as long
            return 2 * size ** 3 / min(best, _best_s(partial(torch.mm, a, b), seconds))
        size *= 2


def _attention_dtype(where: torch.device) -> str:
    return "bfloat16" if where.type == "cuda" else "float32"


def _attention_flops(where: torch.device, seconds: float) -> float:
    """Of the forward of causal attention, counting the half of the scores that it needs."""
    heads, length, width = (16, 4096, 128) if where.type == "cuda" else (4, 512, 64)
    q = torch.randn(1, heads, length, width, device=where).to(getattr(torch, _attention_dtype(where)))
    run = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)  # noqa: E731
    return 2 * heads * length * (length + 1) * width / _best_s(run, seconds)


def _memory_bandwidth(where: torch.device, seconds: float) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones((1 << 30 if where.type == "cuda" else 1 << 27) // 4, device=where)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_s(lambda: target.copy_(source), seconds)


def _operation_s(where: torch.device, seconds: float) -> float:
    """Seconds that an operation on almost nothing takes from the program's side."""
    x, calls = torch.zeros(8, device=where), 1000

    def run() -> None:
        for _ in range(calls):
            x.add_(1.0)

    return _best_s(run, seconds) / calls


def _host_memory() -> float:
    """Bytes of main memory that this process may use: the machine's, or its container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return float(min(total, int(text))) if text.isdigit() else float(total)


def _with_collectives(hardware: Hardware, hosts: list[str], where: torch.device, seconds: float) -> Hardware:
    """Add latency and bandwidth within and between nodes, as far as there are ranks for it."""
    notes = dict(hardware.notes)
    ranks_of = {host: [rank for rank, own in enumerate(hosts) if own == host] for host in dict.fromkeys(hosts)}
    found: dict[str, float] = {}
    within = _same_size_groups(list(ranks_of.values()))
    between = _same_size_groups([list(peers) for peers in zip(*ranks_of.values())])
    for what, partition in (("intra_node", within), ("inter_node", between)):
        if not partition:
            notes[f"{what} collectives"] = f"not measured (ranks: {len(hosts)}, nodes: {len(ranks_of)}); assumed"
            continue
        groups = [dist.new_group(ranks) for ranks in partition]
        group = groups[next(i for i, ranks in enumerate(partition) if dist.get_rank() in ranks)]
        local = _collective(group, where, seconds)
        found[f"{what}_bandwidth"] = reduce_scalars(local, dist.group.WORLD, "min")["bandwidth"]
        found[f"{what}_latency_s"] = reduce_scalars(local, dist.group.WORLD, "max")["latency_s"]
        notes[f"{what} collectives"] = f"measured over {len(partition[0])} ranks, {dist.get_backend()}"
    return replace(hardware, **found, notes=notes)


def _same_size_groups(partition: list[list[int]]) -> list[list[int]]:
    """The groups, if all ranks are in one and they have equally many ranks, at least 2; else none."""
    covered = sum(len(ranks) for ranks in partition) == dist.get_world_size()
    sizes = {len(ranks) for ranks in partition}
    return partition if covered and len(sizes) == 1 and min(sizes) > 1 else []


def _collective(group: ProcessGroup, where: torch.device, seconds: float) -> dict[str, float]:
    """Latency of an all-reduce of one number; bytes that a rank sends per second in one of many.

    Ranks must make equally many calls, so the number of repetitions is agreed first.
    """
    size = dist.get_world_size(group)
    small = torch.zeros(1, device=where)
    large = torch.zeros((1 << 28 if where.type == "cuda" else 1 << 22) // 4, device=where)
    sent = 2 * (size - 1) / size * large.nbytes
    best = []
    for tensor in (small, large):
        once = _repeat_s(tensor, group, 3)
        calls = int(reduce_scalars({"n": max(1, min(1000, seconds / once))}, dist.group.WORLD, "min")["n"])
        best.append(min(_repeat_s(tensor, group, calls) for _ in range(3)))
    return {"latency_s": best[0], "bandwidth": sent / max(1e-9, best[1] - best[0])}


def _repeat_s(tensor: torch.Tensor, group: ProcessGroup, calls: int) -> float:
    """Mean seconds of one all-reduce."""
    dist.barrier(group)
    start = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(tensor, group=group)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls
