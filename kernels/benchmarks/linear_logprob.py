"""linear_logprob: log-probs and entropy under a frozen head, forward and backward, a chunk of tokens at a time.

    python kernels/benchmarks/linear_logprob.py [--check] [--csv FILE]
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main, sides
from torch import Tensor

SHAPES = ((165, 2560, 151936), (1024, 2560, 151936), (1024, 4096, 128256))
"""Tokens, hidden size, vocabulary: Qwen3-4B's head with the tokens of a default chunk and more, Llama 3 8B's."""


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """Forward and backward of every shape, and the gradient from what the forward kept, at a teacher's top 64."""
    dtype = torch.float32 if small else torch.bfloat16
    for shape in ((3, 16, 50),) if small else SHAPES:
        yield from _both(*shape, dtype, device)
        yield _kept(*shape, 5 if small else 65, dtype, device)


def _both(tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    from copd_kernels.linear_logprob import reference, triton_impl

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden, head = normal(tokens, hidden_size).to(dtype), (normal(vocab, hidden_size) * hidden_size ** -0.5).to(dtype)
    ids = torch.randint(vocab, (tokens, 1), generator=generator, device=device)
    grad_picked, grad_entropy = normal(tokens, 1), normal(tokens)
    scored = reference.linear_logprob(hidden, head, ids, 1.0, True)
    modules = {"reference": reference, "triton": triton_impl}
    shape, product = f"T={tokens} H={hidden_size} V={vocab}", 2 * tokens * hidden_size * vocab
    read = dtype.itemsize * hidden_size * (tokens + vocab)
    yield Case(f"forward {shape}", dtype,
               sides(lambda module: module.linear_logprob(hidden, head, ids, 1.0, True), **modules), read, product)
    yield Case(f"forward with what the backward needs {shape}", dtype,
               sides(lambda module: module.linear_logprob(hidden, head, ids, 1.0, False, True), **modules),
               2 * read, 2 * product)
    yield Case(f"backward with entropy {shape}", dtype,
               sides(lambda module: [module.linear_logprob_backward(hidden, head, ids, 1.0, scored.lse_T, grad_picked,
                                                                    scored.entropy_T, grad_entropy)], **modules),
               2 * read, 2 * product)


def _kept(tokens: int, hidden_size: int, vocab: int, ids: int, dtype: torch.dtype, device: torch.device) -> Case:
    from copd_kernels.linear_logprob import reference, triton_impl

    generator = torch.Generator(device).manual_seed(0)
    rest, head = (torch.randn(n, hidden_size, generator=generator, device=device) for n in (tokens, vocab))
    head, ids_TK = head.to(dtype), torch.randint(vocab, (tokens, ids), generator=generator, device=device)
    logprobs, grad = (torch.randn(tokens, ids, generator=generator, device=device) for _ in range(2))
    rows = min(tokens * ids, vocab)  # of the head: each is read once at least
    return Case(f"backward from what was kept T={tokens} H={hidden_size} V={vocab} K={ids}", dtype,
                sides(lambda module: [module.picked_gradient(rest, head, ids_TK, -logprobs.abs(), grad, 1.0)],
                      reference=reference, triton=triton_impl),
                hidden_size * (8 * tokens + dtype.itemsize * rows) + 16 * tokens * ids, 0)


if __name__ == "__main__":
    raise SystemExit(main("linear_logprob", cases))
