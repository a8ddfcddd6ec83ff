"""linear_logprob: one shard is the dense log-softmax, shards combine to it, gradients add up."""
import pytest
import torch

from copd_kernels.linear_logprob.reference import linear_logprob, linear_logprob_backward

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


def test_bfloat16_inputs_are_multiplied_in_float32(case):
    hidden, weight, ids = (t.to(torch.bfloat16) if t.is_floating_point() else t for t in case)
    found = linear_logprob(hidden, weight, ids)
    logits = hidden.detach().double() @ weight.double().T
    assert found.lse_T.dtype == torch.float32
    torch.testing.assert_close(found.picked_TK.double(), logits.gather(1, ids), rtol=1e-5, atol=1e-5)
