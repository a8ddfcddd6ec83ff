"""Both fast forms of prefix attention equal the reference: values, gradients, padding, GQA, outside trunks."""
import pytest
import torch

from copd_kernels.prefix_attention import fused, tiles, triton_impl
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


FORMS = {"reference": reference,
         "fused": lambda q, k, v, spans, *trunk: prefix_attention(q, k, v, Plan.build(spans, len(q), q.device), *trunk),
         "triton": lambda q, k, v, spans, *trunk: triton_impl.prefix_attention(
             q, k, v, Plan.build(spans, len(q), q.device), *trunk)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPANS)
def test_queries_of_some_rows_give_those_rows(name, form, small_tiles):
    """Cut anywhere, the pieces give the whole's rows, and their gradients of keys add up to the whole's."""
    spans, tokens = SPANS[name]
    q, k, v = _inputs(tokens, 4, 2, torch.float64)
    grad, (dtype, tolerance) = torch.randn_like(q), (torch.float32, 1e-5) if form == "triton" else (q.dtype, 1e-12)
    want = reference(q, k, v, spans)
    want_grads = torch.autograd.grad(want, (q, k, v), grad)
    owners = {0: [range(0, 2), range(6, tokens)], 1: [range(2, 6)], 2: []}
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for chunks in owners.values():
        rows = [row for chunk in chunks for row in chunk if row < tokens]
        pieces = [Span(rows.index(low), rows.index(high - 1) + 1, trunk_start, trunk_stop, start, low)
                  for start, stop, trunk_start, trunk_stop in spans for chunk in chunks
                  for low, high in [(max(start, chunk.start), min(stop, chunk.stop, tokens))] if low < high]
        got = FORMS[form](*(x.to(dtype) for x in (q[rows], k, v)), pieces)
        torch.testing.assert_close(got.double(), want[rows], rtol=0, atol=tolerance)
        for total, part in zip(sums, torch.autograd.grad(got, (q, k, v), grad[rows].to(dtype))):
            total += part
    for total, part in zip(sums, want_grads):
        torch.testing.assert_close(total, part, rtol=0, atol=3 * tolerance)


@pytest.mark.parametrize("form", ["fused", "triton"])
@pytest.mark.parametrize("name", ["one group", "trunks of several lengths"])
def test_gradients_of_leaves_with_a_trunk_from_an_earlier_pass_equal_float64(name, form, small_tiles):
    """q, k and v lie in one tensor, the gradient the other way round; the trunks have none."""
    spans, tokens = SPANS[name]
    first = min(start for start, _, a, b in spans if b > a)
    leaves = [(s - first, e - first, a, b) for s, e, a, b in spans if b > a]
    whole = torch.randn(tokens, 8, 8, dtype=torch.float64)
    outcomes = []
    for attention, dtype in ((FORMS["reference"], torch.float64),
                             (FORMS[form], torch.float32 if form == "triton" else torch.float64)):
        own = whole[first:].to(dtype).requires_grad_()
        grad = torch.randn(8, 4, tokens - first, generator=torch.Generator().manual_seed(1)).to(dtype).permute(2, 1, 0)
        trunk = [whole[:first, heads].to(dtype).requires_grad_() for heads in (slice(4, 6), slice(6, 8))]
        out = attention(own[:, :4], own[:, 4:6], own[:, 6:], leaves, trunk)
        gradients = torch.autograd.grad(out, [own, *trunk], grad, allow_unused=True)
        outcomes.append([out.double(), gradients[0].double()])
    assert gradients[1:] == (None, None)
    for want, got in zip(*outcomes):
        torch.testing.assert_close(got, want, rtol=0, atol=3e-5 if form == "triton" else 1e-12)


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


ODD = {
    "lanes of two groups, one without a prompt":
        ([(0, 18, 0, 0), (18, 30, 0, 0), (30, 33, 0, 18), (33, 39, 18, 30), (39, 41, 0, 18), (41, 47, 18, 30),
          (47, 50, 0, 0)], 50),
    "a prompt of one token, an empty leaf, padding":
        ([(0, 1, 0, 0), (1, 4, 0, 1), (4, 4, 0, 1), (4, 20, 0, 1)], 22),
    "two short spans": ([(0, 2, 0, 0), (2, 5, 0, 2)], 5),
    "nothing": ([], 3),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-2}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of each kind on streams that the interpreter can run, and keys that several programs share."""
    launch = triton_impl.Launch(32, 16, 4, 1)
    monkeypatch.setattr(triton_impl, "SIZES", {key: triton_impl.Launches(launch, launch, launch)
                                               for key in triton_impl.SIZES})
    monkeypatch.setattr(tiles, "MOST_ROWS", 9)


def _check(attention, spans, tokens, heads, kv_heads, dim, dtype, device="cpu"):
    """Values and gradients of a form in ``dtype`` against the reference in float64 on the same rounded numbers."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v, grad = (torch.randn(tokens, h, dim, generator=generator).to(device, dtype)
                     for h in (heads, kv_heads, kv_heads, heads))
    given = [x.requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in given]
    got, want = attention(*given, Plan.build(spans, tokens, q.device)), reference(*wide, spans)
    pairs = zip((got, *torch.autograd.grad(got, given, grad)),
                (want, *torch.autograd.grad(want, wide, grad.double())), strict=True)
    for one, other in pairs:
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name, heads, kv_heads, dim, dtype", [
    ("lanes of two groups, one without a prompt", 4, 2, 8, torch.float32),
    ("a prompt of one token, an empty leaf, padding", 3, 1, 20, torch.float32),
    ("two short spans", 34, 1, 16, torch.float32),
    ("a prompt of one token, an empty leaf, padding", 2, 2, 80, torch.bfloat16),
    ("nothing", 2, 1, 16, torch.float32)])
def test_triton_equals_the_reference(small_tiles, name, heads, kv_heads, dim, dtype):
    _check(triton_impl.prefix_attention, *ODD[name], heads, kv_heads, dim, dtype)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_triton_in_tiles_as_they_are_launched(dim):
    _check(triton_impl.prefix_attention, [(0, 70, 0, 0), (70, 75, 0, 70)], 75, 2, 1, dim, torch.bfloat16)


def test_triton_with_a_trunk_from_an_earlier_pass(small_tiles):
    """The trunk's keys have no gradient, the leaves' have that of the leaves alone."""
    spans, tokens = SPANS["trunks of several lengths"]
    q, k, v = _inputs(tokens, 4, 2, torch.float32)
    leaves, own = [(s - 9, e - 9, a, b) for s, e, a, b in spans if b > a], [x[9:] for x in (q, k, v)]
    trunk = k[:9].detach(), v[:9].detach()
    outcomes = []
    for attention in (triton_impl.prefix_attention, fused.prefix_attention):
        out = attention(*own, Plan.build(leaves, tokens - 9, q.device), trunk)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for one, other in zip(*outcomes):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_triton_with_queries_of_some_rows_and_no_gradient_of_keys(small_tiles):
    spans, tokens = SPANS["two trunks of one length, ragged leaves"]
    q, k, v = _inputs(tokens, 4, 2, torch.float32)
    rows = [0, 1, *range(6, tokens)]
    pieces = [Span(0, 2, 0, 0, 0, 0), Span(2, 4, 0, 0, 4, 6), Span(4, 5, 0, 4, 8, 8), Span(5, 10, 4, 8, 9, 9),
              Span(10, 12, 4, 8, 14, 14)]
    plan, grad = Plan.build(pieces, len(rows), q.device), torch.randn(len(rows), 4, 8)
    got = triton_impl.prefix_attention(q[rows], k.detach(), v.detach(), plan)
    want = reference(q, k, v, spans)[rows]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got, q, grad)[0], torch.autograd.grad(want, q, grad)[0], rtol=0,
                               atol=1e-5)


@pytest.mark.parametrize("dim, dtype", [(8, torch.float64), (258, torch.float32)])
def test_triton_refuses_what_it_cannot_do(dim, dtype):
    x = torch.zeros(1, 1, dim, dtype=dtype)
    with pytest.raises(ValueError, match="at most 256; use another form"):
        triton_impl.prefix_attention(x, x, x, Plan.build([(0, 1, 0, 0)], 1, x.device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", [fused, triton_impl], ids=["fused", "triton"])
def test_cuda_equals_the_reference(attention, dtype):
    _check(attention.prefix_attention, *SPANS["trunks of several lengths"], 4, 2, 8, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 64), (14, 2, 64), (4, 4, 80), (8, 1, 96), (32, 8, 128),
                                                  (2, 1, 256)])
def test_cuda_triton_on_many_tiles(heads, kv_heads, dim, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "MOST_ROWS", 256)
    spans = [(0, 700, 0, 0), (700, 733, 0, 0)]
    for length, trunk in ((301, (0, 700)), (5, (700, 733)), (33, (0, 700)), (1, (0, 700)), (129, (700, 733))):
        spans.append((spans[-1][1], spans[-1][1] + length, *trunk))
    _check(triton_impl.prefix_attention, spans, spans[-1][1], heads, kv_heads, dim, dtype, "cuda")
