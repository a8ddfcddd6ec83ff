"""A device apart from the CPU, without a GPU: what CUDA would refuse or wait for shows on any machine.

Its tensors compute on the CPU, but are `Apart`: every operator is looked at before it runs. As with CUDA and NCCL,
tensors of both places do not meet (but for numbers, and indices, which are copied), collectives take those of the
device only, and nothing turns into an array. What makes the host wait until the device has done all it was asked for
is noted: reading a number or a copy, finding out how many elements a mask has, copying from memory that is not pinned
without ``non_blocking``.

No kernel of CUDA runs: that it has one for a dtype or a shape is not shown. Use it on a forked rank (``run_ranks``), as
torch keeps the device for the rest of a process's life.
"""
from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import copd_megatron.platform
from copd_megatron.exchange import payload

NAME = "apart"
ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(f"{ROOT / folder}/" for folder in ("copd_megatron", "kernels/copd_kernels"))

READS = {"_local_scalar_dense", "is_nonzero", "equal"}
"""Operators that give the host a number."""
COUNTS = {"nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive"}
"""Operators of which the size of the result depends on values."""
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
NO_NUMBERS = {"cat", "stack", "index_select", "index_add", "index_add_", "index_copy", "index_copy_", "gather",
              "scatter", "scatter_", "scatter_add", "scatter_add_", "embedding"}
"""Operators that do not even take a number from the CPU."""
MESSAGES = {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16,
            torch.float32, torch.float64}
"""Dtypes that NCCL sends."""


class Apart(Tensor):
    """A tensor of the device; ``held`` has its values on the CPU."""

    held: Tensor
    as_cuda = False
    """What ``is_cuda`` says."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Apart:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0))
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    @property
    def is_cuda(self) -> bool:
        """Whether code that asks is to take its way for CUDA."""
        return self.as_cuda

    @property
    def data(self) -> Tensor:
        """As of any tensor."""
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: Apart) -> None:
        Tensor.data.__set__(self, new)
        self.held = new.held

    def tolist(self) -> Any:
        """Waits."""
        _note("tolist")
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of what it holds."""
        return self.held.untyped_storage()

    def numpy(self, *args: object, **kwargs: object) -> None:
        """Refused, as by CUDA."""
        raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"Apart({self.held!r})"


class _EveryOperator(TorchDispatchMode):
    """Sees operators without tensors of the device, too: those that make some, and collectives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_waits: Counter[str] = Counter()


@contextlib.contextmanager
def apart_device(as_cuda: bool = False) -> Iterator[Counter[str]]:
    """The device of this process inside; gives what the host waited for so far: "file function what" -> times.

    Args:
        as_cuda: its tensors say that they are CUDA's, so that code takes that way; only for operators of the CPU.
    """
    _register()
    Apart.as_cuda, platform, here = as_cuda, copd_megatron.platform, torch.device(NAME, 0)
    places = {  # where torch and Megatron ask for the device, or decide by it without an operator
        (platform, "CPU"): here,  # the answer to Megatron's questions for CUDA
        (Tensor, "cuda"): lambda self, *args, **kwargs: self.to(here),
        (torch, "tensor"): _made_on_the_host(torch.tensor),
        (dist, "batch_isend_irecv"): _one_by_one,
        (dist.distributed_c10d, "_get_object_coll_device"): lambda group=None: NAME,
    }
    given = {place: getattr(*place) for place in places}
    _waits.clear()
    try:
        for place, value in places.items():
            setattr(*place, value)
        # A thread for the device's backward would outlive this, and forbid forks.
        with torch.autograd.set_multithreading_enabled(False), _EveryOperator():
            yield _waits
    finally:
        for place, value in given.items():
            setattr(*place, value)


class _Module:
    """What stands for ``torch.cuda``."""

    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = staticmethod(lambda seed: None)
    current_stream = staticmethod(lambda: torch.cuda.current_stream())  # the one stream of ``platform``
    stream = staticmethod(contextlib.nullcontext)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


@functools.cache
def _register() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # older torch has none

    payload.BLOCK[NAME] = payload.BLOCK["cpu"]
    _setup_privateuseone_for_python_backend(NAME, _Module())


def _made_on_the_host(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.tensor``, which copies to CUDA and waits; where it does so, no operator is seen."""
    def tensor(data: object, *, device: object = None, **how: Any) -> Tensor:
        if device is None or torch.device(device).type not in (NAME, "cuda"):
            return create(data, device=device, **how)
        return create(data, **how).to(torch.device(NAME, 0))

    return tensor


def _one_by_one(operations: list[dist.P2POp]) -> list[dist.Work]:
    """``batch_isend_irecv`` of backends that know no batches."""
    return [operation.op(operation.tensor, group=operation.group, tag=operation.tag, **{
        "group_dst" if operation.op is dist.isend else "group_src": operation.group_peer})
        for operation in operations]


def _run(func: Any, args: tuple, kwargs: dict) -> Any:
    """One operator, on what the device's tensors hold."""
    space, name = func._schema.name.split("::")
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    inside = [t for t in tensors if isinstance(t, Apart)]
    outside = [t for t in tensors if not isinstance(t, Apart) and t.device.type == "cpu"]
    if space == "c10d":
        _check_message(func, inside, outside)
    elif name in ("_to_copy", "copy_"):
        _note_copy(name, args, kwargs, device)
    elif inside:
        _check_places(func, name, args, inside, outside)
        if name in READS | COUNTS or name == "repeat_interleave" and kwargs.get("output_size") is None:
            _note(name)
    if device == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    there = isinstance(args[0], Apart) if name == "copy_" else device == NAME or bool(inside) and device is None
    if name in READS or not there:
        return result
    if name == "resize_":
        args[0].data = Apart(result)
        return args[0]
    known = {id(t.held): t for t in inside}
    result = tree_map(lambda t: (known[id(t)] if id(t) in known else Apart(t)) if isinstance(t, Tensor) else t, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if inside and space == "aten" else result


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, Apart) else leaf


def _check_message(func: Any, inside: list[Tensor], outside: list[Tensor]) -> None:
    if outside:
        raise RuntimeError(f"{func}: no backend for tensors of the CPU, {[tuple(t.shape) for t in outside]}")
    if strange := {t.dtype for t in inside} - MESSAGES:
        raise RuntimeError(f"{func}: {strange}; NCCL sends no such numbers")
    if not all(t.is_contiguous() for t in inside):
        raise RuntimeError(f"{func}: tensors must be contiguous")


def _note_copy(name: str, args: tuple, kwargs: dict, device: str | None) -> None:
    if name == "copy_":
        to, source = (isinstance(t, Apart) for t in args[:2])
        free = len(args) > 2 and args[2]
    else:
        source = isinstance(args[0], Apart)
        to, free = source if device is None else device == NAME, kwargs.get("non_blocking")
    if source and not to:
        _note("read")  # memory of ours is never pinned, so that non_blocking changes nothing
    elif to and not source and not free:
        _note("write")


def _check_places(func: Any, name: str, args: tuple, inside: list[Tensor], outside: list[Tensor]) -> None:
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, Apart) for index in indices):
            _note("index from the CPU")
        # A number in the place of a mask is filled in, and needs no count.
        filled = len(args) > 2 and args[2].numel() == 1
        if any(index.dtype == torch.bool for index in indices) and not filled:
            _note("mask")
        outside = [t for t in outside if not any(t is index for index in indices)]
    if strangers := [t for t in outside if t.dim() or name in NO_NUMBERS or name.startswith("_foreach")]:
        cpu, there = ([tuple(t.shape) for t in own] for own in (strangers, inside))
        raise RuntimeError(f"{func}: expected all tensors on one device, but found {cpu} on the CPU and {there} on the "
                           "device")


def _note(what: str) -> None:
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    where = "elsewhere"
    if frame is not None:
        where = f"{Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()} {frame.f_code.co_name}"
    _waits[f"{where} {what}"] += 1
