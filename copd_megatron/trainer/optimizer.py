"""One AdamW and one schedule per expert, gradients reduced in its adapter group only.

Learning rate: linear warm-up, then constant.
"""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from copd_megatron.config.trainer import OptimizerConfig
from copd_megatron.model.adapter_bank import AdapterBank, Cut
from copd_megatron.optional import choose_maker
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device
from copd_megatron.trainer.adamw import build_adamw, moments, restore


class ExpertOptimizer:
    """Updates one expert's adapters on the ranks that host it."""

    def __init__(self, expert: str, bank: AdapterBank, groups: Groups, config: OptimizerConfig):
        self.expert, self.bank, self.groups, self.config = expert, bank, groups, config
        self.parameters, self.dtype = bank.parameters_of(expert), bank.dtype
        self.updates = 0
        maker = choose_maker("optimizer.adam", config.adam, "fused Adam",
                             device().type == "cuda" and self.dtype == torch.float32)
        self.adamw = build_adamw(list(self.parameters.values()), config, maker)

    def learning_rate(self) -> float:
        """Of the next update: lr x min(1, (updates + 1) / warmup_steps)."""
        warmup = self.config.warmup_steps
        return self.config.lr * min(1.0, (self.updates + 1) / warmup) if warmup else self.config.lr

    def zero_grad(self) -> None:
        """Drop gradients."""
        for parameter in self.parameters.values():  # Apex's zero_grad has other arguments than torch's
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> dict[str, Tensor | float]:
        """Reduce, clip, update. Every rank that hosts the expert calls it.

        Returns:
            grad_norm (before clipping), adapter_norm (after the update) and lr.
        """
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        for parameter, grad in zip(self.parameters.values(), grads):
            parameter.grad = grad
        self._reduce(grads)
        norm = self._norm(grads)
        clip = torch.clamp(self.config.max_grad_norm / (norm + 1e-6), max=1.0)
        if grads:
            torch._foreach_mul_(grads, clip)
        lr = self.learning_rate()
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.bank.changed(self.expert)
        self.updates += 1
        return {"grad_norm": norm, "adapter_norm": self._norm(list(self.parameters.values())), "lr": lr}

    def _reduce(self, grads: list[Tensor]) -> None:
        """Sum over the expert's replicas and over the ranks that share out the rows, in flat messages.

        Context ranks saw rows of their own, and so did TP ranks under sequence parallelism: there the factors that
        each of them holds whole are summed too (split ones saw all rows). Ranks with a copy of the same key/value
        head saw query heads of their own.
        """
        _sum_flat(grads, self.groups.adapter[self.expert])
        _sum_flat(grads, self.groups.cp)
        if self.groups.layout.sequence_parallel:
            _sum_flat([g for p, g in zip(self.parameters.values(), grads) if p.cut is None], self.groups.tp)
        copied: dict[Cut, list[Tensor]] = {}
        for parameter, grad in zip(self.parameters.values(), grads):
            if parameter.cut is not None and parameter.cut.copies > 1:
                copied.setdefault(parameter.cut, []).append(grad)
        for cut, parts in copied.items():
            _sum_copies(parts, cut, self.groups.coords.tp, self.groups.tp)

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        """Norm over the whole expert of one tensor per parameter: split factors summed over TP, replicated ones and
        copies counted once, all summed over PP."""
        split, whole = torch.zeros(2, dtype=self.dtype, device=device())
        for parameter, tensor in zip(self.parameters.values(), tensors):
            if parameter.cut is None:
                whole = whole + tensor.pow(2).sum()
            elif self.groups.coords.tp % parameter.cut.copies == 0:
                split = split + tensor.pow(2).sum()
        if self.groups.layout.tp > 1:
            dist.all_reduce(split, group=self.groups.tp)
        total = split + whole
        if self.groups.layout.pp > 1:
            dist.all_reduce(total, group=self.groups.pp)
        return total.sqrt()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Adam moments by parameter name: {"layers.0...lora_A": {"exp_avg", "exp_avg_sq", "step"}}."""
        return {name: moments(self.adamw, p) for name, p in self.parameters.items() if p in self.adamw.state}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Inverse of ``state_dict``; parameters without state start afresh."""
        self.updates = updates
        restore(self.adamw, {self.parameters[name]: own for name, own in state.items()})


def _sum_flat(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over the group, in place and in one message."""
    if dist.get_world_size(group) == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    for tensor, piece in zip(tensors, flat.split([t.numel() for t in tensors])):
        tensor.copy_(piece.view_as(tensor))


def _sum_copies(tensors: list[Tensor], cut: Cut, tp_rank: int, group: dist.ProcessGroup) -> None:
    """Sum each piece over the ranks that hold a copy of it, in place and in one message of all pieces."""
    own = torch.cat([t.reshape(-1) for t in tensors])
    pieces = own.new_zeros(cut.pieces, len(own))
    pieces[cut.of_rank(tp_rank)] = own
    dist.all_reduce(pieces, group=group)
    for tensor, summed in zip(tensors, pieces[cut.of_rank(tp_rank)].split([t.numel() for t in tensors])):
        tensor.copy_(summed.view_as(tensor))
