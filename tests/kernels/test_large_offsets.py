"""Rows that lie 2^31 numbers and more apart: offsets that 32 bits do not hold. The files are sparse."""
import pytest
import torch

from copd_kernels.grouped_lora import reference as plain_lora
from copd_kernels.grouped_lora import triton_impl as grouped_lora
from copd_kernels.grouped_lora.segments import Segments
from copd_kernels.linear_logprob import triton_impl as linear_logprob
from copd_kernels.prefix_attention import triton_impl as prefix_attention
from copd_kernels.prefix_attention.plan import Plan
from copd_kernels.rowwise_fp8 import reference as plain_fp8
from copd_kernels.rowwise_fp8 import triton_impl as rowwise_fp8
from copd_kernels.vocab_topk import reference as plain_topk
from copd_kernels.vocab_topk import triton_impl as vocab_topk
from support.watched_memory import watched

STRIDE = 2**30 + 8
"""Fits 32 bits; twice and four times it do not."""
ROWS = 5
CPU = torch.device("cpu")


@pytest.fixture
def apart(tmp_path):
    """A copy of rows with ``STRIDE`` numbers from one to the next."""
    def place(rows: torch.Tensor) -> torch.Tensor:
        path, size = tmp_path / f"{len(list(tmp_path.iterdir()))}", STRIDE * (len(rows) - 1) + rows[0].numel()
        with path.open("wb") as file:
            file.truncate(size * rows.itemsize)
        memory = torch.from_file(str(path), shared=True, size=size, dtype=rows.dtype)
        far = memory.as_strided(rows.shape, (STRIDE, *rows.stride()[1:]))
        return far.copy_(rows)

    with watched():  # or what does not hold would touch memory that is not there
        yield place
    for path in tmp_path.iterdir():
        path.unlink()


def test_vocab_topk_and_linear_logprob(apart):
    logits, ids = torch.randn(ROWS, 33), torch.randint(33, (ROWS, 2))
    far = apart(logits)
    for found, wanted in zip(vocab_topk.vocab_topk(far, 4, ids), plain_topk.vocab_topk(logits, 4, ids)):
        torch.testing.assert_close(found, wanted)
    scores = linear_logprob.row_scores(far, ids)
    torch.testing.assert_close(scores.lse_T, logits.logsumexp(1))
    torch.testing.assert_close(scores.picked_TK, logits.gather(1, ids))


def test_a_head_and_its_rows(apart):
    """Probabilities in place, and rows of the head in a gradient."""
    hidden, head, ids = torch.randn(ROWS, 16), torch.randn(ROWS, 16), torch.arange(ROWS)[:, None]
    logits = hidden @ head.T
    rest = linear_logprob.rest_(apart(logits), logits.logsumexp(1), ids, hidden, head, 1.0)
    torch.testing.assert_close(rest, logits.softmax(1).scatter(1, ids, 0) @ head)
    logprobs, grad = logits.log_softmax(1).gather(1, ids), torch.randn(ROWS, 1)
    found = linear_logprob.picked_gradient(rest, apart(head), ids, logprobs, grad, 1.0)
    leaf = hidden.clone().requires_grad_()
    ((leaf @ head.T).log_softmax(1).gather(1, ids) * grad).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_grouped_lora(apart):
    segments = Segments.build([slice(0, 3), torch.tensor([4, 3])], CPU)
    x, y = torch.randn(ROWS, 20), torch.randn(ROWS, 24)
    down, up = ([torch.randn(*shape) for _ in range(2)] for shape in ((3, 20), (24, 3)))
    h = plain_lora.grouped_down(x, down, segments)
    torch.testing.assert_close(grouped_lora.grouped_down(apart(x), down, segments), h)
    found = grouped_lora.grouped_up(apart(y), apart(h), up, [1.0, 2.0], segments)
    torch.testing.assert_close(found, plain_lora.grouped_up(y, h, up, [1.0, 2.0], segments))
    whole = Segments.build([slice(0, ROWS)], CPU)
    gradient, = grouped_lora._gradient_of(up[:1], apart(y), apart(h), torch.ones(1), whole, (0, 24, 0))
    torch.testing.assert_close(gradient, y.T @ h)


def test_prefix_attention(apart):
    plan = Plan.build([(0, 2, 0, 0), (2, 5, 0, 2)], ROWS, CPU)
    near = [torch.randn(ROWS, heads, 16) for heads in (4, 2, 2)]
    outcomes = []
    for form in (lambda x: x, apart):
        leaves = [form(x).requires_grad_() for x in near]
        out = prefix_attention.prefix_attention(*leaves, plan)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(map(torch.equal, *outcomes))


def test_rowwise_fp8(apart):
    x = torch.randn(ROWS, 37, dtype=torch.bfloat16)
    for found, wanted in zip(rowwise_fp8.quantise_rows(apart(x)), plain_fp8.quantise_rows(x)):
        assert torch.equal(found.float(), wanted.float())
