"""vocab_topk: the definition against a full sort, and the same answer however the columns are cut."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_kernels.vocab_topk.reference import NO_ID, merge_topk, vocab_topk


def by_full_sort(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = logits.sort(dim=1, descending=True, stable=True)  # stable: equal values by lowest id
    return values[:, :k], ids[:, :k]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4), st.data())
def test_equals_a_stable_sort_with_many_ties_and_any_cut(seed, vocab, spread, data):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-spread, spread, (3, vocab), generator=generator).float()
    k = data.draw(st.integers(1, vocab))
    values, ids, lse = vocab_topk(logits, k)
    wanted_values, wanted_ids = by_full_sort(logits, k)
    assert torch.equal(values, wanted_values) and torch.equal(ids, wanted_ids)
    torch.testing.assert_close(lse, logits.logsumexp(1))

    cut = data.draw(st.integers(0, vocab))
    parts = [vocab_topk(part, k) for part in (logits[:, :cut], logits[:, cut:])]
    candidates = torch.cat([p[0] for p in parts], 1), torch.cat([parts[0][1], parts[1][1] + cut], 1)
    merged = merge_topk(*candidates, k)
    assert torch.equal(merged[0], wanted_values) and torch.equal(merged[1], wanted_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_row(dtype):
    logits = torch.randn(2, 30_011, dtype=dtype)
    values, ids, lse = vocab_topk(logits, 64)
    wanted_values, wanted_ids = by_full_sort(logits, 64)
    assert torch.equal(values, wanted_values) and torch.equal(ids, wanted_ids)
    assert values.dtype == lse.dtype == dtype and ids.dtype == torch.int64


def test_narrow_empty_and_no_rows():
    values, ids, lse = vocab_topk(torch.tensor([[1.0, 3.0]]), 4)
    assert values.tolist() == [[3.0, 1.0, -torch.inf, -torch.inf]] and ids.tolist() == [[1, 0, NO_ID, NO_ID]]
    values, ids, lse = vocab_topk(torch.empty(2, 0), 1)
    assert ids.tolist() == [[NO_ID], [NO_ID]] and lse.tolist() == [-torch.inf] * 2
    assert vocab_topk(torch.empty(0, 5), 2)[0].shape == (0, 2)


def test_bad_k():
    with pytest.raises(ValueError, match="k: 0"):
        vocab_topk(torch.zeros(1, 3), 0)
