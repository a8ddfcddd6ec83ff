"""vocab_topk: the definition against a full sort, and the same answer however the columns are cut."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_kernels.vocab_topk import reference, triton_impl
from copd_kernels.vocab_topk.reference import NO_ID, merge_topk, vocab_topk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_full_sort(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = logits.sort(dim=1, descending=True, stable=True)  # stable: equal values by lowest id
    return values[:, :k], ids[:, :k]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 4), st.data())
def test_equals_a_stable_sort_with_many_ties_and_any_cut(seed, vocab, spread, data):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-spread, spread, (3, vocab), generator=generator).float()
    k = data.draw(st.integers(1, vocab))
    values, ids, lse, _ = vocab_topk(logits, k)
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
    values, ids, lse, _ = vocab_topk(logits, 64)
    wanted_values, wanted_ids = by_full_sort(logits, 64)
    assert torch.equal(values, wanted_values) and torch.equal(ids, wanted_ids)
    assert values.dtype == lse.dtype == dtype and ids.dtype == torch.int64


def test_narrow_empty_and_no_rows():
    values, ids, lse, _ = vocab_topk(torch.tensor([[1.0, 3.0]]), 4)
    assert values.tolist() == [[3.0, 1.0, -torch.inf, -torch.inf]] and ids.tolist() == [[1, 0, NO_ID, NO_ID]]
    values, ids, lse, _ = vocab_topk(torch.empty(2, 0), 1)
    assert ids.tolist() == [[NO_ID], [NO_ID]] and lse.tolist() == [-torch.inf] * 2
    assert vocab_topk(torch.empty(0, 5), 2)[0].shape == (0, 2)


def test_bad_k():
    with pytest.raises(ValueError, match="k: 0"):
        vocab_topk(torch.zeros(1, 3), 0)


def equal_to_reference(logits: torch.Tensor, k: int, wanted: torch.Tensor | None = None) -> None:
    ours, theirs = (f(logits.to(DEVICE), k, wanted if wanted is None else wanted.to(DEVICE))
                    for f in (triton_impl.vocab_topk, vocab_topk))
    assert torch.equal(ours.values_RK, theirs.values_RK) and torch.equal(ours.ids_RK, theirs.ids_RK)
    torch.testing.assert_close(ours.lse_R, theirs.lse_R, rtol=1e-6, atol=1e-6)
    if wanted is None:
        assert ours.picked_RJ is None
    else:
        assert torch.equal(ours.picked_RJ, theirs.picked_RJ)


@pytest.mark.interpreted
@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (5, 9), (37, 5), (700, 64)])
def test_triton_equals_the_reference(vocab, k, monkeypatch):
    torch.manual_seed(vocab)
    ids = torch.randint(-2, vocab + 2, (3, 3))  # some of another shard
    equal_to_reference(torch.randn(3, vocab), k, ids)
    ties = torch.randint(-2, 3, (3, vocab)).float()
    ties[0, ::3] = -0.0
    equal_to_reference(ties, k)


def blocks_of(size: int, monkeypatch) -> None:
    """Many small blocks and a short queue, so that few columns reach every branch."""
    monkeypatch.setattr(triton_impl, "BLOCK", size)
    monkeypatch.setattr(triton_impl, "QUEUE", size)


@pytest.mark.interpreted
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 90), st.integers(1, 8), st.sampled_from([1, 3, 100]))
def test_triton_takes_the_lowest_ids_of_equal_values_from_any_block(seed, vocab, k, spread):
    with pytest.MonkeyPatch.context() as patch:
        blocks_of(16, patch)
        generator = torch.Generator().manual_seed(seed)
        equal_to_reference(torch.randint(-spread, spread + 1, (2, vocab), generator=generator).float(), k)


@pytest.mark.interpreted
@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal", "masked"])
def test_triton_keeps_the_best_of_many_blocks(order, monkeypatch):
    """Of rising rows every block has the best so far, of falling ones only the first."""
    blocks_of(16, monkeypatch)
    row = torch.randn(203)
    row = {"rising": row.sort().values, "falling": row.sort(descending=True).values, "equal": torch.ones(203),
           "masked": torch.where(torch.arange(203) % 40 == 39, row, -torch.inf)}.get(order, row)
    equal_to_reference(torch.stack([row, torch.randn(203)]), 8)


@pytest.mark.interpreted
def test_triton_on_views_and_nothing():
    equal_to_reference(torch.randn(4, 50)[1:3, :41], 3)
    equal_to_reference(torch.full((2, 9), -torch.inf), 2)
    assert triton_impl.vocab_topk(torch.empty(0, 5, device=DEVICE), 2).values_RK.shape == (0, 2)
    empty = triton_impl.vocab_topk(torch.empty(2, 0, device=DEVICE), 1)
    assert empty.ids_RK.tolist() == [[NO_ID]] * 2 and empty.lse_R.tolist() == [-torch.inf] * 2


@pytest.mark.parametrize(("dtype", "k"), [(torch.float64, 2), (torch.float32, 257)])
def test_triton_refuses_what_it_cannot(dtype, k):
    with pytest.raises(ValueError, match="model.kernels=reference"):
        triton_impl.vocab_topk(torch.zeros(1, 300, dtype=dtype), k)


@pytest.mark.interpreted
@pytest.mark.parametrize("module", [reference, triton_impl])
def test_shards_merge_to_the_whole_in_float64(module):
    """Shards narrower than k, an empty one, values tied across them, rows with fewer than k numbers or none."""
    torch.manual_seed(0)
    cuts, k = [0, 5, 9, 9, 40], 12
    logits, ids = torch.randint(-3, 4, (6, 40)).double() / 4, torch.randint(0, 40, (6, 3))
    logits[1], logits[2, 7:], logits[3] = -torch.inf, -torch.inf, 0.25
    parts = [module.vocab_topk(logits[:, a:b].float().to(DEVICE), k, (ids - a).to(DEVICE))
             for a, b in zip(cuts, cuts[1:])]
    found = merge_topk(torch.cat([part.values_RK for part in parts], 1), torch.cat(
        [torch.where(part.ids_RK == NO_ID, NO_ID, part.ids_RK + a) for part, a in zip(parts, cuts)], 1), k)
    values, wanted = by_full_sort(logits, k)
    assert torch.equal(found[0].double().cpu(), values) and torch.equal(found[1].cpu(), wanted)
    lse = torch.stack([part.lse_R for part in parts]).logsumexp(0)
    torch.testing.assert_close(lse.double().cpu(), logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(sum(part.picked_RJ for part in parts).double().cpu(), logits.gather(1, ids))


def test_what_a_narrow_shard_could_not_fill_comes_last():
    none, three = torch.full((1, 5), -torch.inf), torch.tensor([[NO_ID, NO_ID, 2, 0, 1]])
    assert merge_topk(none, three, 4)[1].tolist() == [[0, 1, 2, NO_ID]]
