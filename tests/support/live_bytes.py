"""What tensors really hold: all of a process, those that autograd saved, and the peak of a piece of work."""
from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under these tensors: a view counts as all that it keeps alive."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def allocated_bytes() -> int:
    """Bytes of every tensor that lives in this process."""
    gc.collect()
    return storage_bytes([o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.device.type != "meta"])


@contextmanager
def saved_by_autograd(besides: Iterable[Tensor]) -> Iterator[dict[int, tuple[int, tuple[int, ...]]]]:
    """Storage -> (bytes, shape of one tensor on it) of all that graphs recorded in the block keep, but ``besides``.

    The storages live as long as the graph does, so read it before the backward.
    """
    known = {t.untyped_storage()._cdata for t in besides}
    found: dict[int, tuple[int, tuple[int, ...]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes(), tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class PeakBytes(TorchDispatchMode):
    """Within the block, the bytes of tensors made in it that live together: ``now`` and ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage(), before)
        return out

    def _enter(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or key in before:
            return
        self._live.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size
