"""grouped_lora: the adapters of G experts on one stream, against a loop over the experts and torch's grouped product.

    python kernels/benchmarks/grouped_lora.py [--check] [--csv FILE]
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from harness import Case, main, sides
from torch import Tensor

SHAPES = ((16384, 2560, 32, 1), (16384, 2560, 32, 3), (16384, 2560, 32, 8), (4096, 4096, 64, 8))
"""Rows, features in and out, rank, experts; the experts have equal shares of the rows."""


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Forward, and forward with the gradients of rows and factors."""
    for shape in ((12, 16, 4, 2),) if small else SHAPES:
        yield from _both(*shape, torch.float32 if small else torch.bfloat16, device)


def _both(tokens: int, size: int, rank: int, experts: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from copd_kernels.grouped_lora import reference, triton_impl
    from copd_kernels.grouped_lora.segments import Segments

    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    x, y = (draw(tokens, size).to(dtype).requires_grad_() for _ in range(2))
    down, up = ([(draw(*shape) * shape[1] ** -0.5).requires_grad_() for _ in range(experts)]
                for shape in ((rank, size), (size, rank)))
    ends = [(n + 1) * tokens // experts for n in range(experts)]
    segments = Segments.build([slice(*pair) for pair in zip([0, *ends], ends)], device)

    def evaluate(module: ModuleType) -> Tensor:
        h = module.grouped_down(x, down, segments)
        return module.grouped_up(y.clone(), h, up, [1.0] * experts, segments)  # Triton overwrites y

    def forward(module: ModuleType) -> Sequence[Tensor]:
        with torch.no_grad():
            return [evaluate(module)]

    def update(module: ModuleType) -> Sequence[Tensor]:
        out = evaluate(module)
        return [out, *torch.autograd.grad(out, [x, *down, *up], y)]

    modules = {"reference": reference, "triton": triton_impl}
    rivals = {} if dtype == torch.float32 else {"grouped_mm": _by_torch(x, y, down, up, ends)}
    shape, product = f"T={tokens} K=M={size} r={rank} G={experts}", 4 * tokens * rank * size
    rows, factors = dtype.itemsize * tokens, 8 * size * rank * experts
    yield Case(f"forward {shape}", dtype, sides(forward, **modules) | rivals, rows * (3 * size + 2 * rank) + factors,
               product)
    yield Case(f"update {shape}", dtype, sides(update, **modules), rows * (6 * size + 4 * rank) + 3 * factors,
               3 * product)


def _by_torch(x: Tensor, y: Tensor, down: Sequence[Tensor], up: Sequence[Tensor], ends: Sequence[int]):
    """torch's grouped product, on rows that lie in the order of the experts and factors that are stacked already."""
    bounds = torch.tensor(ends, dtype=torch.int32, device=x.device)
    stacks = [torch.stack([f.detach().to(x.dtype) for f in factors]).transpose(1, 2) for factors in (down, up)]

    def work() -> Sequence[Tensor]:
        with torch.no_grad():
            return [y + F.grouped_mm(F.grouped_mm(x, stacks[0], offs=bounds), stacks[1], offs=bounds)]

    return work


if __name__ == "__main__":
    raise SystemExit(main("grouped_lora", cases))
