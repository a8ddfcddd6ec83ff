"""Token weights: each reduction written out, and the same sum however the batch is split."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.losses.reduction import token_weights

KINDS = ["seq_mean", "token_mean", "constant"]


def reduce_by_hand(losses: list[list[float]], kind: str, max_tokens: int) -> float:
    if kind == "seq_mean":
        return sum(sum(s) / len(s) for s in losses if s) / len(losses)
    if kind == "token_mean":
        return sum(sum(s) for s in losses) / max(1, sum(len(s) for s in losses))
    return sum(sum(s) / max_tokens for s in losses) / len(losses)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), max_size=5), min_size=1, max_size=8), st.sampled_from(KINDS),
       st.data())
def test_any_split_sums_to_the_reduction(losses, kind, data):
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(losses), max_size=len(losses)))
    totals = {"total_sequences": len(losses), "total_tokens": sum(map(len, losses)), "max_tokens": 7}
    total = 0.0
    for part in range(3):  # ranks, microbatches or splits of the update: all the same to the weights
        mine = [s for s, p in zip(losses, parts) if p == part]
        weights = token_weights(torch.tensor([len(s) for s in mine], dtype=torch.long), kind, **totals,
                                dtype=torch.float64)
        total += float((weights * torch.tensor([x for s in mine for x in s], dtype=torch.float64)).sum())
    assert abs(total - reduce_by_hand(losses, kind, 7)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_do_not_count(kind):
    lengths, mask = torch.tensor([3, 2]), torch.tensor([True, False, True, False, False])
    weights = token_weights(lengths, kind, 2, 2, 5, loss_mask_T=mask)
    each = {"seq_mean": 1 / 4, "token_mean": 1 / 2, "constant": 1 / 10}[kind]
    torch.testing.assert_close(weights, torch.tensor([each, 0, each, 0, 0]))
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "mean"}, "seq_mean, token_mean or constant"),
    ({"total_sequences": 1}, "total_sequences"),
    ({"total_tokens": 4, "kind": "token_mean"}, "total_tokens"),
    ({"max_tokens": 0, "kind": "constant"}, "max_tokens"),
    ({"loss_mask_T": torch.ones(4, dtype=torch.bool)}, "loss_mask_T"),
])
def test_bad_input(change, message):
    good = {"lengths": torch.tensor([3, 2]), "kind": "seq_mean", "total_sequences": 2, "total_tokens": 5,
            "max_tokens": 4}
    with pytest.raises(ValueError, match=message):
        token_weights(**(good | change))
