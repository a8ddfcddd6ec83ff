"""vocab_topk: the k largest logits, log-sum-exp and the sampled token's logit, against torch's separate operations.

    python kernels/benchmarks/vocab_topk.py [--check] [--csv FILE]
"""
from __future__ import annotations

from collections.abc import Iterator

import torch
from harness import Case, main, sides

SHAPES = ((1024, 128256, 64), (1024, 151936, 64), (1024, 151936, 256), (4096, 18992, 64))
"""Rows, vocabulary, k: Llama 3's, Qwen3's, and an eighth of that (one shard of TP 8)."""


def cases(small: bool, device: torch.device) -> Iterator[Case]:
    """One per shape."""
    return (_case(*shape, device) for shape in (((3, 70, 4),) if small else SHAPES))


def _case(rows: int, vocab: int, k: int, device: torch.device) -> Case:
    from copd_kernels.vocab_topk import reference, triton_impl

    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocab, generator=generator, device=device)
    ids = torch.randint(vocab, (rows, 1), generator=generator, device=device)
    return Case(f"R={rows} V={vocab} k={k}", torch.float32,
                sides(lambda module: module.vocab_topk(logits, k, ids), reference=reference, triton=triton_impl),
                4 * rows * vocab + 12 * rows * k, 0)


if __name__ == "__main__":
    raise SystemExit(main("vocab_topk", cases))
