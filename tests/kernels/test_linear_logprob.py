"""linear_logprob: one shard is the dense log-softmax, shards combine to it, gradients add up."""
import pytest
import torch

from copd_kernels.linear_logprob import reference, triton_impl
from copd_kernels.linear_logprob.reference import linear_logprob, linear_logprob_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TOKENS, HIDDEN, VOCAB, IDS = 7, 5, 11, 3


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS, IDS))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_one_shard_is_the_dense_softmax(case, temperature):
    hidden, weight, ids = case
    logprobs = (hidden @ weight.T / temperature).log_softmax(1)
    found = linear_logprob(hidden, weight, ids, temperature, entropy=True)
    torch.testing.assert_close(found.picked_TK - found.lse_T[:, None], logprobs.gather(1, ids).detach())
    torch.testing.assert_close(found.entropy_T, -(logprobs.exp() * logprobs).sum(1).detach())
    assert linear_logprob(hidden, weight, ids).entropy_T is None and not found.lse_T.requires_grad


@pytest.mark.parametrize("cuts", [[0, 4, 11], [0, 0, 11], [0, 1, 7, 11]])
def test_shards_combine_by_the_contract(case, cuts):
    hidden, weight, ids = case
    whole = linear_logprob(hidden, weight, ids, 0.8, entropy=True)
    shards = [linear_logprob(hidden, weight[a:b], ids - a, 0.8, entropy=True) for a, b in zip(cuts, cuts[1:])]
    lse = torch.stack([s.lse_T for s in shards]).logsumexp(0)
    shares = [(s.lse_T - lse).exp() for s in shards]
    entropy = sum(w * s.entropy_T + torch.special.entr(w) for w, s in zip(shares, shards))
    torch.testing.assert_close(lse, whole.lse_T)
    torch.testing.assert_close(entropy, whole.entropy_T)
    torch.testing.assert_close(sum(s.picked_TK for s in shards), whole.picked_TK)


@pytest.mark.parametrize("cuts", [[0, 11], [0, 4, 11], [0, 0, 11]])
@pytest.mark.parametrize("what", ["picked", "entropy", "both"])
def test_gradients_of_the_shards_add_up(case, cuts, what):
    hidden, weight, ids = case
    ids[:, 2] = ids[:, 0]  # an id given twice
    logprobs = (hidden @ weight.T / 0.8).log_softmax(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    grad_picked, grad_entropy = torch.randn_like(ids.double()), torch.randn_like(entropy)
    loss = (grad_picked * logprobs.gather(1, ids)).sum() * (what != "entropy")
    wanted, = torch.autograd.grad(loss + (grad_entropy * entropy).sum() * (what != "picked"), hidden)
    lse = (hidden @ weight.T / 0.8).logsumexp(1).detach()
    found = sum(linear_logprob_backward(
        hidden, weight[a:b], ids - a, 0.8, lse, None if what == "entropy" else grad_picked, entropy.detach(),
        None if what == "picked" else grad_entropy) for a, b in zip(cuts, cuts[1:]))
    torch.testing.assert_close(found, wanted)


def kept_gradient(implementation, hidden, weight, ids, grad_picked, cuts):
    """The gradient of log-probs over shards, from what each shard's forward keeps."""
    shards = [implementation.linear_logprob(hidden, weight[a:b], ids - a, 0.8, True, rest=True)
              for a, b in zip(cuts, cuts[1:])]
    lse = torch.stack([s.lse_T for s in shards]).logsumexp(0)
    logprobs = sum(s.picked_TK for s in shards) - lse[:, None]
    rests = [s.rest_TH * (s.lse_T - lse).exp()[:, None] for s in shards]
    return sum(implementation.picked_gradient(rest, weight[a:b], ids - a, logprobs, grad_picked, 0.8)
               for rest, a, b in zip(rests, cuts, cuts[1:]))


@pytest.mark.parametrize("cuts", [[0, 11], [0, 4, 11], [0, 0, 11]])
def test_what_the_forward_keeps_gives_the_gradient(case, cuts):
    hidden, weight, ids = case
    ids[:, 2] = ids[:, 0]  # an id given twice
    grad_picked = torch.randn_like(ids.double())
    logprobs = (hidden @ weight.T / 0.8).log_softmax(1)
    wanted, = torch.autograd.grad((grad_picked * logprobs.gather(1, ids)).sum(), hidden)
    torch.testing.assert_close(kept_gradient(reference, hidden.detach(), weight, ids, grad_picked, cuts), wanted)


def test_rows_of_a_narrower_head_are_gathered_for_a_few_tokens_at_a_time(case, monkeypatch):
    hidden, weight, ids = case
    weight, grad_picked = weight.bfloat16(), torch.randn_like(ids.double())
    wanted = kept_gradient(reference, hidden.detach(), weight.double(), ids, grad_picked, [0, 4, 11])
    for gathered in (1, 2 * IDS * HIDDEN, 2**24):
        monkeypatch.setattr(reference, "GATHERED", gathered)
        found = kept_gradient(reference, hidden.detach(), weight, ids, grad_picked, [0, 4, 11])
        torch.testing.assert_close(found, wanted)


def test_bfloat16_inputs_are_multiplied_in_float32(case):
    hidden, weight, ids = (t.to(torch.bfloat16) if t.is_floating_point() else t for t in case)
    found = linear_logprob(hidden, weight, ids)
    logits = hidden.detach().double() @ weight.double().T
    assert found.lse_T.dtype == torch.float32
    torch.testing.assert_close(found.picked_TK.double(), logits.gather(1, ids), rtol=1e-5, atol=1e-5)


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Rows of many blocks without many columns."""
    monkeypatch.setattr(triton_impl, "BLOCK", 8)


@pytest.mark.interpreted
@pytest.mark.parametrize("vocab", [1, 8, 29])
@pytest.mark.parametrize("entropy", [False, True])
def test_triton_scores_equal_float64(vocab, entropy, narrow_blocks):
    torch.manual_seed(vocab)
    hidden, weight = (3 * torch.randn(n, HIDDEN) for n in (TOKENS, vocab))
    ids = torch.randint(-3, vocab + 3, (TOKENS, IDS))
    found = triton_impl.linear_logprob(*(x.to(DEVICE) for x in (hidden, weight, ids)), 0.7, entropy)
    wanted = linear_logprob(hidden.double(), weight.double(), ids, 0.7, entropy)
    for ours, theirs in zip(found, wanted):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours.double().cpu(), theirs, rtol=2e-6, atol=2e-5)


@pytest.mark.interpreted
@pytest.mark.parametrize("what", ["picked", "entropy", "both"])
@pytest.mark.parametrize("cuts", [[0, 29], [0, 9, 9, 29]])
def test_triton_gradients_equal_float64(what, cuts, narrow_blocks):
    """Over shards, one of them empty, with an id given twice and ids of other shards."""
    torch.manual_seed(1)
    vocab = cuts[-1]
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(vocab, HIDDEN)
    ids = torch.randint(0, vocab, (TOKENS, IDS))
    ids[:, 2] = ids[:, 0]
    picked, slope = torch.randn(TOKENS, IDS), torch.randn(TOKENS)
    truth = linear_logprob(hidden.double(), weight.double(), ids, 0.8, entropy=True)

    def gradient(implementation, dtype):
        given = None if what == "entropy" else picked.to(DEVICE, dtype)
        slopes = None if what == "picked" else slope.to(DEVICE, dtype)
        return sum(implementation(hidden.to(DEVICE, dtype), weight[a:b].to(DEVICE, dtype), (ids - a).to(DEVICE), 0.8,
                                  truth.lse_T.to(DEVICE, dtype), given, truth.entropy_T.to(DEVICE, dtype), slopes)
                   for a, b in zip(cuts, cuts[1:]))

    torch.testing.assert_close(gradient(triton_impl.linear_logprob_backward, torch.float32).double(),
                               gradient(linear_logprob_backward, torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted
@pytest.mark.parametrize("cuts", [[0, 29], [0, 9, 9, 29]])
def test_triton_keeps_what_the_reference_keeps(cuts, narrow_blocks):
    torch.manual_seed(2)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(cuts[-1], HIDDEN)
    ids = torch.randint(0, cuts[-1], (TOKENS, IDS))
    ids[:, 2] = ids[:, 0]
    picked = torch.randn(TOKENS, IDS)
    found = kept_gradient(triton_impl, *(x.to(DEVICE) for x in (hidden, weight, ids, picked)), cuts)
    wanted = kept_gradient(reference, hidden.double(), weight.double(), ids, picked.double(), cuts)
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [[0, 29], [0, 9, 9, 29]])
def test_triton_with_more_ids_than_the_vocabulary_has(cuts, dtype, narrow_blocks):
    """Every id of a row several times, among ids that are compared in parts; tokens without weight get exactly 0."""
    torch.manual_seed(4)
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(cuts[-1], HIDDEN).to(dtype)
    ids, picked, slope = torch.randint(0, cuts[-1], (TOKENS, 70)), torch.randn(TOKENS, 70), torch.randn(TOKENS)
    picked[3], slope[3] = 0, 0
    leaf = hidden.double().requires_grad_()
    logprobs = (leaf @ weight.double().T / 0.8).log_softmax(1)
    entropy, loss = -(logprobs.exp() * logprobs).sum(1), (picked * logprobs.gather(1, ids)).sum()
    kept, = torch.autograd.grad(loss, leaf, retain_graph=True)
    both, = torch.autograd.grad(loss + (slope * entropy).sum(), leaf)
    lse = (leaf.detach() @ weight.double().T / 0.8).logsumexp(1)
    hidden, weight, ids, picked, slope, lse, entropy = (x.detach().to(DEVICE) for x in (
        hidden, weight, ids, picked, slope, lse.float(), entropy.float()))
    found = kept_gradient(triton_impl, hidden, weight, ids, picked, cuts)
    again = sum(triton_impl.linear_logprob_backward(hidden, weight[a:b], ids - a, 0.8, lse, picked, entropy, slope)
                for a, b in zip(cuts, cuts[1:]))
    for ours, wanted in ((found, kept), (again, both)):
        torch.testing.assert_close(ours.double().cpu(), wanted, rtol=2e-5, atol=5e-5)
        assert not ours[3].any()


@pytest.mark.interpreted
def test_triton_takes_no_tokens_and_no_float64():
    none = torch.empty(0, HIDDEN, device=DEVICE)
    weight, ids = torch.ones(4, HIDDEN, device=DEVICE), torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    assert triton_impl.linear_logprob(none, weight, ids).picked_TK.shape == (0, 2)
    assert triton_impl.linear_logprob_backward(none, weight, ids, 1.0, none[:, 0], none[:, :2]).shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="model.kernels=reference"):
        triton_impl.linear_logprob(none.double(), weight, ids)
    assert triton_impl.picked_gradient(none, weight, ids, none[:, :2], none[:, :2], 1.0).shape == (0, HIDDEN)
    with pytest.raises(ValueError, match="model.kernels=reference"):
        triton_impl.picked_gradient(none.double(), weight, ids, none[:, :2], none[:, :2], 1.0)
