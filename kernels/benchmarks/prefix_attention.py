"""prefix_attention: one group, P tokens of prompt and G completions of R, forward and forward with backward.

    python kernels/benchmarks/prefix_attention.py [--check] [--csv FILE]

`update` has the prompt in the stream and gradients of all; `leaves` has its keys and values from an earlier pass. At
full size the first side is torch's fused form, as the reference would hold every score matrix.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from harness import Case, main, sides
from torch import Tensor

SHAPES = ((4096, 1024, 8), (16384, 1024, 8), (1024, 8192, 8), (256, 32, 64))
"""P, R, G: the middle, long videos, long reasoning, short answers."""
HEADS = ((32, 8, 128), (14, 2, 64))
"""Query heads, key/value heads, head dim: Qwen3-4B's, Qwen2.5-0.5B's."""

Form = Callable[..., Tensor]


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Forward, update and leaves of every shape."""
    for shape in ((7, 3, 2),) if small else SHAPES:
        for heads in ((4, 2, 16),) if small else HEADS:
            yield from _group(*shape, *heads, small, device)


def _group(prefix: int, completion: int, group: int, heads: int, kv_heads: int, dim: int, small: bool,
           device: torch.device) -> Iterator[Case]:
    from copd_kernels.prefix_attention import fused, reference, triton_impl
    from copd_kernels.prefix_attention.plan import Plan

    tokens, dtype = prefix + group * completion, torch.float32 if small else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, count, dim, generator=generator, device=device).to(dtype)
                     for count in (heads, kv_heads, kv_heads, heads))
    stream, own = ([x[first:].clone().requires_grad_() for x in (q, k, v)] for first in (0, prefix))
    spans = [(0, prefix, 0, 0), *((at, at + completion, 0, prefix) for at in range(prefix, tokens, completion))]
    leaves = [(start - prefix, stop - prefix, 0, prefix) for start, stop, *_ in spans[1:]]
    whole, part = Plan.build(spans, tokens, device), Plan.build(leaves, tokens - prefix, device)

    def plain(q: Tensor, k: Tensor, v: Tensor, plan: Plan, trunk=None) -> Tensor:
        return reference.prefix_attention(q, k, v, plan.pieces, trunk)

    def forward(form: Form) -> Sequence[Tensor]:
        with torch.no_grad():
            return [form(q, k, v, whole)]

    def update(form: Form) -> Sequence[Tensor]:
        out = form(*stream, whole)
        return [out, *torch.autograd.grad(out, stream, grad)]

    def completions(form: Form) -> Sequence[Tensor]:
        out = form(*own, part, (k[:prefix], v[:prefix]))
        return [out, *torch.autograd.grad(out, own, grad[prefix:])]

    forms = ({"reference": plain} if small else {}) | {"fused": fused.prefix_attention,
                                                       "triton": triton_impl.prefix_attention}
    product, numbers = 4 * dim * heads, dtype.itemsize * dim * (heads + kv_heads)
    trunk, leaf = product * prefix ** 2 // 2, product * group * (completion * prefix + completion ** 2 // 2)
    shape = f"P={prefix} R={completion} G={group} heads={heads}/{kv_heads} d={dim}"
    # The forward reads q, k, v and writes out; the backward reads these and dO and writes three gradients.
    yield Case(f"forward {shape}", dtype, sides(forward, **forms), 2 * tokens * numbers, trunk + leaf)
    yield Case(f"update {shape}", dtype, sides(update, **forms), 6 * tokens * numbers, 7 * (trunk + leaf) // 2)
    yield Case(f"leaves {shape}", dtype, sides(completions, **forms),
               6 * (tokens - prefix) * numbers + 4 * prefix * dtype.itemsize * dim * kv_heads, 7 * leaf // 2)


if __name__ == "__main__":
    raise SystemExit(main("prefix_attention", cases))
