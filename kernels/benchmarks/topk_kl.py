"""topk_kl: divergence of K log-probs and a tail per token, and its gradient, against autograd on the definition.

    python kernels/benchmarks/topk_kl.py [--check] [--csv FILE]
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from harness import Case, main, sides
from torch import Tensor


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """All three divergences, forward and backward."""
    return (_case(kind, *((5, 8) if small else (65536, 64)), device) for kind in ("reverse", "forward", "jsd"))


def _case(kind: str, tokens: int, k: int, device: torch.device) -> Case:
    from copd_kernels.topk_kl import reference, triton_impl

    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (torch.randn(tokens, 2 * k, generator=generator, device=device).log_softmax(1)[:, :k].clone()
                        for _ in range(2))
    tail = torch.log1p(-teacher.exp().sum(1))
    student.requires_grad_()

    def work(module: ModuleType) -> Sequence[Tensor]:
        value = module.topk_divergence(student, teacher, tail, kind)
        return [value, *torch.autograd.grad(value.sum(), student)]

    # Both sides and the tail are read, value and gradient written; the backward scales the gradient.
    return Case(f"{kind} T={tokens} K={k}", torch.float32, sides(work, reference=reference, triton=triton_impl),
                4 * tokens * (5 * k + 3), 0)


if __name__ == "__main__":
    raise SystemExit(main("topk_kl", cases))
