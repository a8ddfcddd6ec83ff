"""Triton's interpreter with an eye on memory: it runs programs one after another, each as one thread, which hides what
a GPU would do to the numbers.

``watched`` raises at addresses outside every tensor that the launch was given, as a mask is missing, instead of
touching them, and collects, launch by launch, in words:

* an address that one program writes and another one reads or writes: their order is open;
* an address that a program writes at one place and reads or writes at another without ``tl.debug_barrier`` between
  them: its threads need not see it. The same addresses in the same order are the same thread's;
* one store of different values to one address.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class _Launch:
    """What the programs of one launch have touched so far."""

    def __init__(self, name: str, tensors: list[torch.Tensor]):
        self.name, self.faults = name, set()
        self.bounds = sorted((t.data_ptr(), t.data_ptr() + t.itemsize * (1 + sum(
            (size - 1) * stride for size, stride in zip(t.shape, t.stride())))) for t in tensors if t.numel())
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        """Addresses by program."""

    def begin(self) -> None:
        """The next program."""
        self.read.append(np.empty(0, np.uint64))
        self.written.append(np.empty(0, np.uint64))
        self.barrier()

    def barrier(self) -> None:
        """What came before is seen by all threads from here on."""
        self.fresh: list[tuple[bool, np.ndarray]] = []

    def touch(self, at: np.ndarray, mask: np.ndarray, values: np.ndarray | None) -> None:
        """One load, or store of ``values``."""
        at, mask = (np.broadcast_to(x, np.broadcast_shapes(at.shape, mask.shape)) for x in (at, mask))
        values = None if values is None else np.broadcast_to(values, mask.shape)[mask]
        at, store = at[mask].astype(np.uint64), values is not None
        if not at.size:
            return
        starts, stops = (np.array(side, np.uint64) for side in zip(*self.bounds))
        place = np.searchsorted(starts, at, "right") - 1
        if (place < 0).any() or (at >= stops[np.maximum(place, 0)]).any():
            raise IndexError(f"{self.name} touches memory outside its tensors")
        if store:
            order = np.argsort(at, kind="stable")
            same = at[order][1:] == at[order][:-1]
            if (values[order][1:][same] != values[order][:-1][same]).any():
                self.faults.add("stores different values to one address")
        for stored, other in self.fresh:
            if (stored or store) and not np.array_equal(other, at) and np.intersect1d(other, at).size:
                self.faults.add("threads meet without a barrier")
        self.fresh.append((store, at))
        own = self.written if store else self.read
        own[-1] = np.union1d(own[-1], at)

    def finish(self) -> list[str]:
        """Faults in words."""
        if self.written:
            everybodys, writers = np.unique(np.concatenate(self.written), return_counts=True)
            if (writers > 1).any():
                self.faults.add("programs write to one address")
            if any(np.isin(np.setdiff1d(read, own), everybodys).any() for read, own in zip(self.read, self.written)):
                self.faults.add("programs read what others write")
        return [f"{self.name}: {fault}" for fault in sorted(self.faults)]


@contextmanager
def watched() -> Iterator[dict[str, list[str]]]:
    """Kernel launched -> its faults, for all launches inside."""
    from triton.runtime import interpreter

    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    stock = {name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_barrier",
                                                       "set_grid_idx")}
    stock_call, found, running = grid.__call__, {}, []

    def load(self: Any, ptrs: Any, mask: Any, *how: Any) -> Any:
        running[-1].touch(ptrs.data, mask.data, None)
        return stock["create_masked_load"](self, ptrs, mask, *how)

    def store(self: Any, ptrs: Any, value: Any, mask: Any, *how: Any) -> Any:
        running[-1].touch(ptrs.data, mask.data, value.data)
        return stock["create_masked_store"](self, ptrs, value, mask, *how)

    def barrier(self: Any) -> None:
        running[-1].barrier()

    def program(self: Any, *at: int) -> None:
        running[-1].begin()
        stock["set_grid_idx"](self, *at)

    def call(self: Any, *args: Any, **options: Any) -> None:
        name = self.fn.__name__
        running.append(_Launch(name, [x for x in (*args, *options.values()) if isinstance(x, torch.Tensor)]))
        stock_call(self, *args, **options)
        found.setdefault(name, []).extend(running.pop().finish())

    mended = {"create_masked_load": load, "create_masked_store": store, "create_barrier": barrier,
              "set_grid_idx": program}
    for name, method in mended.items():
        setattr(builder, name, method)
    grid.__call__ = call
    try:
        yield found
    finally:
        grid.__call__ = stock_call
        for name, method in stock.items():
            setattr(builder, name, method)
