"""Fused prefix attention equals its reference: values, gradients, padding, GQA, outside trunks."""
import pytest
import torch

from copd_kernels.prefix_attention.fused import prefix_attention
from copd_kernels.prefix_attention.plan import Plan, Span
from copd_kernels.prefix_attention.reference import prefix_attention as reference

SPANS = {
    "one causal span": ([(0, 5, 0, 0)], 5),
    "ragged spans": ([(0, 9, 0, 0), (9, 10, 0, 0), (10, 14, 0, 0)], 14),
    "one group": ([(0, 7, 0, 0), (7, 10, 0, 7), (10, 12, 0, 7)], 12),
    "two trunks of one length, ragged leaves":
        ([(0, 4, 0, 0), (4, 8, 0, 0), (8, 9, 0, 4), (9, 14, 4, 8), (14, 16, 4, 8)], 16),
    "trunks of several lengths":
        ([(0, 3, 0, 0), (3, 9, 0, 0), (9, 11, 0, 3), (11, 12, 3, 9), (12, 20, 3, 9)], 20),
}


def _inputs(tokens, heads, kv_heads, dtype):
    generator = torch.Generator().manual_seed(tokens)
    make = lambda h: torch.randn(tokens, h, 8, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
    return make(heads), make(kv_heads), make(kv_heads)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("name", SPANS)
def test_fused_equals_reference_in_float64(name, heads, kv_heads):
    spans, tokens = SPANS[name]
    q, k, v = _inputs(tokens, heads, kv_heads, torch.float64)
    grad = torch.randn_like(q)
    want = reference(q, k, v, spans)
    want_grads = torch.autograd.grad(want, (q, k, v), grad)
    got = prefix_attention(q, k, v, Plan.build(spans, tokens, q.device))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for one, other in zip(torch.autograd.grad(got, (q, k, v), grad), want_grads):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_trunk_from_an_earlier_pass_equals_one_pass_for_the_leaves():
    spans, tokens = SPANS["trunks of several lengths"]
    q, k, v = _inputs(tokens, 4, 2, torch.float64)
    whole = prefix_attention(q, k, v, Plan.build(spans, tokens, q.device))
    trunk_tokens = 9
    leaves = [(s - trunk_tokens, e - trunk_tokens, a, b) for s, e, a, b in spans if b > a]
    part = prefix_attention(*(x[trunk_tokens:] for x in (q, k, v)),
                            Plan.build(leaves, tokens - trunk_tokens, q.device),
                            (k[:trunk_tokens].detach(), v[:trunk_tokens].detach()))
    torch.testing.assert_close(part, whole[trunk_tokens:], rtol=0, atol=1e-12)
    grad = torch.randn_like(part)
    want = torch.autograd.grad(whole[trunk_tokens:], q, grad, retain_graph=True)[0]
    got = torch.autograd.grad(part, q, grad)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", [
    lambda q, k, v, spans: prefix_attention(q, k, v, Plan.build(spans, len(q), q.device)), reference],
    ids=["fused", "reference"])
@pytest.mark.parametrize("name", SPANS)
def test_queries_of_some_rows_give_those_rows(name, attention):
    """Cut anywhere, the pieces give the whole's rows, and their gradients of keys add up to the whole's."""
    spans, tokens = SPANS[name]
    q, k, v = _inputs(tokens, 4, 2, torch.float64)
    grad = torch.randn_like(q)
    want = reference(q, k, v, spans)
    want_grads = torch.autograd.grad(want, (q, k, v), grad)
    owners = {0: [range(0, 2), range(6, tokens)], 1: [range(2, 6)], 2: []}
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for chunks in owners.values():
        rows = [row for chunk in chunks for row in chunk if row < tokens]
        pieces = [Span(rows.index(low), rows.index(high - 1) + 1, trunk_start, trunk_stop, start, low)
                  for start, stop, trunk_start, trunk_stop in spans for chunk in chunks
                  for low, high in [(max(start, chunk.start), min(stop, chunk.stop, tokens))] if low < high]
        got = attention(q[rows], k, v, pieces)
        torch.testing.assert_close(got, want[rows], rtol=0, atol=1e-12)
        for total, part in zip(sums, torch.autograd.grad(got, (q, k, v), grad[rows])):
            total += part
    for total, part in zip(sums, want_grads):
        torch.testing.assert_close(total, part, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_stays_close(dtype, tolerance):
    spans, tokens = SPANS["trunks of several lengths"]
    q, k, v = (x.detach().requires_grad_() for x in _inputs(tokens, 4, 2, dtype))
    got = prefix_attention(q, k, v, Plan.build(spans, tokens, q.device))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = reference(*wide, spans)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    grad = torch.randn_like(q)
    for one, other in zip(torch.autograd.grad(got, (q, k, v), grad),
                          torch.autograd.grad(want, wide, grad.double())):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=3 * tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_the_reference(dtype):
    spans, tokens = SPANS["trunks of several lengths"]
    q, k, v = (x.detach().cuda().requires_grad_() for x in _inputs(tokens, 4, 2, dtype))
    grad = torch.randn_like(q)
    got = prefix_attention(q, k, v, Plan.build(spans, tokens, q.device))
    got_grads = torch.autograd.grad(got, (q, k, v), grad)
    q64, k64, v64 = (x.detach().double().requires_grad_() for x in (q, k, v))
    want = reference(q64, k64, v64, spans)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    for one, other in zip(got_grads, torch.autograd.grad(want, (q64, k64, v64), grad.double())):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=3 * tolerance)
