"""The device that stands for CUDA refuses what CUDA and NCCL refuse, and notes what they wait for."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copd_megatron.platform import device, on_device
from support.apart_device import Apart, apart_device
from support.ranks import run_ranks


def inside(work, **how):
    """What ``work`` returns on a forked rank where the device is there, and what was waited for."""
    def on_the_rank():
        with apart_device(**how) as waits:
            found = work()
            return found, dict(waits)

    return run_ranks(1, on_the_rank)[0]


def test_it_computes_and_differentiates():
    def work():
        x = torch.arange(6.0, device="cuda").view(2, 3).requires_grad_()
        assert x.device == device() and isinstance(x, Apart) and not x.is_cuda
        y = torch.nn.functional.silu(x[1:] * 2) @ torch.ones(3, 4, device=device())
        (y ** 2).sum().backward()
        return x.grad.cpu(), y.detach().cpu()

    (gradient, y), waits = inside(work)
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    wanted = torch.nn.functional.silu(x[1:] * 2) @ torch.ones(3, 4)
    (wanted ** 2).sum().backward()
    torch.testing.assert_close((gradient, y), (x.grad, wanted.detach()))
    assert waits == {"elsewhere read": 2}


@pytest.mark.parametrize("work, message", [
    (lambda x: x + torch.ones(3), "expected all tensors on one device"),
    (lambda x: torch.cat([x, torch.ones(1)]), "expected all tensors on one device"),
    (lambda x: torch.stack([x[0], torch.tensor(1.0)]), "expected all tensors on one device"),
    (lambda x: torch.ones(3)[x.long()], "expected all tensors on one device"),
    (lambda x: x.numpy(), "use Tensor.cpu"),
    (lambda x: np.asarray(x), "use Tensor.cpu"),
    (lambda x: dist.all_reduce(torch.ones(3)), "no backend for tensors of the CPU"),
    (lambda x: dist.all_reduce(x.to(torch.int16)), "NCCL sends no such numbers"),
    (lambda x: dist.all_reduce(torch.ones(3, 2, device=x.device).T), "must be contiguous")])
def test_it_refuses(work, message):
    def refused():
        with pytest.raises((RuntimeError, TypeError), match=message):
            work(torch.ones(3, device="cuda"))

    inside(refused)


@pytest.mark.parametrize("work, noted", [
    (lambda x: x.sum().item(), "_local_scalar_dense"), (lambda x: bool(x[0]), "_local_scalar_dense"),
    (lambda x: x.tolist(), "tolist"), (lambda x: x.cpu(), "read"), (lambda x: torch.equal(x, x), "equal"),
    (lambda x: x[x > 0], "mask"), (lambda x: x.nonzero(), "nonzero"), (lambda x: x[torch.tensor([1])],
                                                                       "index from the CPU"),
    (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"), (lambda x: x.add_(torch.ones(3).to(x.device)),
                                                                     "write"),
    (lambda x: torch.tensor([1.0], device=x.device), "write"), (lambda x: x.copy_(torch.ones(3)), "write"),
    # What needs no wait: numbers, masks to be filled, copies that the device catches up with, its own indices.
    (lambda x: x * torch.tensor(2.0), None), (lambda x: x.masked_fill_(x > 0, 1.0), None),
    (lambda x: on_device(np.ones(3), x.device), None), (lambda x: x[torch.ones(1, dtype=torch.int64, device=x.device)],
                                                        None),
    (lambda x: torch.full((2,), 3.0, device=x.device), None), (lambda x: dist.all_reduce(x), None)])
def test_it_notes_waits(work, noted):
    _, waits = inside(lambda: work(torch.ones(3, device="cuda")) is None)
    assert waits == ({} if noted is None else {f"elsewhere {noted}": 1})


def test_code_can_take_its_way_for_cuda():
    assert inside(lambda: torch.ones(1, device="cuda").is_cuda, as_cuda=True) == (True, {})
