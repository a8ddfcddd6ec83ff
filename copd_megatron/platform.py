"""CPU or CUDA under Megatron-Core: one place that lets the same stack run on either.

Megatron-Core 0.19 is written for CUDA: it asks CUDA for the current device, for generators and for streams.
All its arithmetic is plain torch, so on a machine without CUDA those questions are answered with the
CPU: tensors land in host memory, the CPU generator is the generator, streams and events have nothing to
order. Where CUDA exists nothing is patched.

Importing this module is enough; it may come before or after Megatron-Core, but before any of it runs.
"""
from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
META = torch.device("meta")
_only_shapes = False

FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye",
             "rand", "randn", "randint", "randperm",
             "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
"""Functions of ``torch`` that take ``device=``; Megatron calls several of them with ``device="cuda"``."""

NOTICES = ("(Transformer Engine and )?Apex (is|are) not installed",
           "full scope is deprecated. Use empty cuda_graph",
           "Using a large number of experts")
"""Patterns of the warnings that are not shown; the second one comes with every TransformerConfig, the third advises to
route in another dtype than the backbone was trained with."""


def device() -> torch.device:
    """Where this process computes: its current CUDA device, or the CPU when there is no CUDA."""
    if _only_shapes:
        return META
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def on_device(array: np.ndarray, where: torch.device) -> torch.Tensor:
    """A tensor of the array there, copied without waiting for what the device has yet to do.

    On the CPU it shares the array's memory; CUDA has read the array when this returns, as it is not pinned.
    """
    return torch.from_numpy(array).to(where, non_blocking=True)


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Models that are built inside have shapes and no values (device "meta"), whatever their size."""
    global _only_shapes
    asked = torch.cuda.current_device
    # Megatron passes the answer on as ``device=``.
    torch.cuda.current_device = lambda: META
    _only_shapes = True
    try:
        yield
    finally:
        torch.cuda.current_device, _only_shapes = asked, False


def default_backend() -> Literal["gloo", "nccl"]:
    """The torch.distributed backend that fits `device`: NCCL for CUDA, gloo for the CPU."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def setup_platform() -> None:
    """Make Megatron-Core usable on this machine. Runs when this module is imported; more calls do nothing."""
    _silence_notices()
    if torch.cuda.is_available() or getattr(torch.cuda, "_copd_answers_with_cpu", False):
        return
    _answer_device_questions()
    _send_factories_to_cpu()
    _answer_generator_questions()
    _make_streams_trivial()
    _take_ragged_messages()
    _name_tensor_types_for_megatron()
    torch.cuda._copd_answers_with_cpu = True


def _silence_notices() -> None:
    """Drop notices that are true of every run here and ask nothing of the user.

    Which optional parts run is decided and reported elsewhere, so Megatron's fallback notices only repeat it.
    The RNG notice fires on every tracked region when the CPU's generator plays the CUDA one.
    """
    for notice in NOTICES:
        warnings.filterwarnings("ignore", message=notice)
    _drop_records("megatron.core.tensor_parallel.random", "CPU RNG state changed within GPU RNG context")
    _drop_records("torch.utils.cpp_extension", "No CUDA runtime is found")


def _drop_records(logger_name: str, beginning: str) -> None:
    """Keep the records of one logger that begin with ``beginning`` from being shown."""
    logger = logging.getLogger(logger_name)
    if not any(getattr(f, "beginning", None) == beginning for f in logger.filters):
        def keep(record: logging.LogRecord) -> bool:
            return not record.getMessage().startswith(beginning)
        keep.beginning = beginning
        logger.addFilter(keep)


def _answer_device_questions() -> None:
    """Megatron passes ``torch.cuda.current_device()`` on as ``device=``, so a torch.device is an answer."""
    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _send_factories_to_cpu() -> None:
    """Schedules, optimizers and checkpoints create small tensors with the literal ``device="cuda"``.

    ``with torch.device(...)`` acts on the functions that it lists at its first use; they must be the
    originals, or models that transformers builds on "meta" come out with uninitialised buffers.
    """
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _without_cuda(getattr(torch, name)))


def _without_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


class _OneGenerator:
    """Stands for ``torch.cuda.default_generators``: whatever the index, the CPU's default generator."""

    def __getitem__(self, index: object) -> torch.Generator:
        return torch.default_generator


def _answer_generator_questions() -> None:
    """Megatron's RNG tracker and activation checkpointing save and restore the CUDA generator's state.

    ``_lazy_call`` would queue the restore until CUDA starts, that is forever; it runs at once instead.
    Megatron copies that name when it is imported, so the copy is replaced too where it exists already.
    """
    def get_state(device: object = "cuda") -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = "cuda") -> None:
        torch.set_rng_state(new_state)

    def seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def call_now(callback: Callable[[], None], **kwargs: Any) -> None:
        callback()

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_state
        module.set_rng_state = set_state
        module.manual_seed = seed
    torch.cuda.default_generators = _OneGenerator()
    torch.cuda._lazy_call = call_now
    if megatron_random := sys.modules.get("megatron.core.tensor_parallel.random"):
        megatron_random._lazy_call = call_now


class _Event:
    """A CUDA event where work is done when its call returns: nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """A CUDA stream where calls already run in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def _make_streams_trivial() -> None:
    """Gradient buffers, MoE dispatch and asynchronous checkpoints order work with streams and events."""
    only = _Stream()
    torch.cuda.Stream = _Stream
    torch.cuda.Event = _Event
    torch.cuda.current_stream = lambda device=None: only
    torch.cuda.default_stream = lambda device=None: only
    torch.cuda.stream = lambda stream: contextlib.nullcontext(stream)
    torch.Tensor.record_stream = lambda self, stream: None


def _take_ragged_messages() -> None:
    """Megatron's MoE layers exchange pieces of different sizes, as NCCL permits and gloo does not, and leave the sizes
    in tensors, which they bring to the host from CUDA only."""
    gather, scatter, exchange = dist.all_gather, dist.reduce_scatter, dist.all_to_all_single

    @functools.wraps(gather)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False):
        if async_op or all(piece.shape == tensor_list[0].shape for piece in tensor_list):
            return gather(tensor_list, tensor, group, async_op)
        tensor_list[dist.get_rank(group)].copy_(tensor)
        for source, piece in enumerate(tensor_list):
            if piece.numel():
                dist.broadcast(piece, group=group, group_src=source)

    @functools.wraps(scatter)
    def reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], op: Any = dist.ReduceOp.SUM,
                       group: Any = None, async_op: bool = False):
        if async_op or all(piece.shape == input_list[0].shape for piece in input_list):
            return scatter(output, input_list, op, group, async_op)
        for target, piece in enumerate(input_list):
            if piece.numel():
                total = piece.clone(memory_format=torch.contiguous_format)
                dist.reduce(total, group=group, group_dst=target, op=op)
                if target == dist.get_rank(group):
                    output.copy_(total)

    @functools.wraps(exchange)
    def all_to_all_single(output: torch.Tensor, input: torch.Tensor, output_split_sizes: Any = None,
                          input_split_sizes: Any = None, *args: Any, **kwargs: Any):
        sizes = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
        return exchange(output, input, *sizes, *args, **kwargs)

    dist.all_gather, dist.reduce_scatter, dist.all_to_all_single = all_gather, reduce_scatter, all_to_all_single


def _name_tensor_types_for_megatron() -> None:
    """Megatron's optimizers compare ``tensor.type()`` with names like "torch.cuda.FloatTensor".

    Only callers inside Megatron get the CUDA name; everybody else gets the truth.
    """
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> str | torch.Tensor:
        result = original(self, *args, **kwargs)
        if isinstance(result, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_of


setup_platform()
