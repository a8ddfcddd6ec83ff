"""A teacher's top-k to the student's hidden states through the sharded head, against dense distributions in float64."""
import pytest
import torch
import torch.distributed as dist

from copd_megatron.losses.topk_kl import log_tail, topk_divergence
from copd_megatron.model.vocab_parallel import Head, score
from support.ranks import run_ranks

TOKENS, HIDDEN, VOCAB, PADDED, TOPK = 9, 6, 11, 24, 7
"""7 of 11 ids: more than any of three shards of 8 rows has, of which the last is all padding."""
KINDS = ["reverse", "forward", "jsd"]
TEMPERATURE, WEIGHT = 0.7, 0.3
MASK = torch.tensor([1.0, 0, 1, -2, 0, 0, 1, 1, 0.5])


def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student's and teacher's hidden states, head, targets; small integers, so that many logits are equal."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randint(-2, 3, (2, TOKENS, HIDDEN), generator=generator).double() / 8
    teacher[8] = 0  # all logits equal
    weight = torch.randint(-2, 3, (PADDED, HIDDEN), generator=generator).double()
    weight[VOCAB:] = 50
    return student, teacher, weight, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def on_a_rank(kernels: str, dtype: torch.dtype) -> dict[str, tuple[torch.Tensor, ...]]:
    """By kind: the teacher's ids, values, and the gradient of the student's hidden states."""
    student, teacher, weight, targets = (x.to(dtype) if x.is_floating_point() else x for x in drawn())
    rows = PADDED // dist.get_world_size()
    start = dist.get_rank() * rows
    head, found = Head(weight[start:start + rows], start, VOCAB, dist.group.WORLD, 4, kernels), {}
    known = score(teacher, head, targets, temperature=TEMPERATURE, topk=TOPK)
    for kind in KINDS:
        leaf = student.clone().requires_grad_()
        at = score(leaf, head, targets, temperature=TEMPERATURE, at_ids_TK=known.topk_ids_TK).at_logprobs_TK
        value = topk_divergence(at, known.topk_logprobs_TK, log_tail(known.topk_logprobs_TK), kind, WEIGHT, kernels)
        (value * MASK.to(dtype)).sum().backward()
        found[kind] = known.topk_ids_TK, value.detach(), leaf.grad
    return found


def dense(kind: str) -> tuple[torch.Tensor, ...]:
    student, teacher, weight, _ = drawn()
    leaf = student.requires_grad_()
    p, q = ((x @ weight[:VOCAB].T / TEMPERATURE).softmax(1) for x in (leaf, teacher))
    ids = q.sort(dim=1, descending=True, stable=True).indices[:, :TOPK]
    rest = torch.ones_like(q).scatter(1, ids, 0)
    p, q = (torch.cat([x.gather(1, ids), (x * rest).sum(1, keepdim=True)], 1) for x in (p, q))
    m = WEIGHT * q + (1 - WEIGHT) * p
    value = {"reverse": p * (p / q).log(), "forward": q * (q / p).log(),
             "jsd": WEIGHT * q * (q / m).log() + (1 - WEIGHT) * p * (p / m).log()}[kind].sum(1)
    (value * MASK.double()).sum().backward()
    return ids, value.detach(), leaf.grad


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("kernels, dtype, tolerance", [("reference", torch.float64, 1e-11),
                                                       ("triton", torch.float32, 2e-5)])
def test_values_and_gradients_equal_dense_float64(ranks, kernels, dtype, tolerance):
    for found in run_ranks(ranks, on_a_rank, kernels, dtype):
        for kind in KINDS:
            ids, value, gradient = dense(kind)
            assert torch.equal(found[kind][0], ids), "ties go to the lowest ids, across shards"
            torch.testing.assert_close(found[kind][1].double(), value, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(found[kind][2].double(), gradient, rtol=tolerance, atol=tolerance)
            assert not found[kind][2][MASK == 0].any(), "rows that count for nothing get exactly nothing"
