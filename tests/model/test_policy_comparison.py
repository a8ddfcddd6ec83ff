"""Policies compared at the same tokens: dense float64 definitions, however tokens, vocabulary and ranks are cut."""
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from copd_megatron.model.policy_comparison import Comparison, compare_policies
from copd_megatron.model.vocab_parallel import Head
from support.ranks import run_ranks

TOKENS, HIDDEN, OTHERS = 11, 6, 3
SHAPES = {"even": (13, 16), "one rank holds only padding": (5, 12), "ties": (13, 16)}
"""Real and padded rows of the head."""


def case_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """[1 + OTHERS, T, H] hidden states and the head."""
    generator = torch.Generator().manual_seed(5)
    vocab, padded = SHAPES[name]
    states = torch.randn(1 + OTHERS, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64)
    if name == "ties":  # small integers: many equal logits within and across shards
        states, weight = states.sign(), weight.round()
    weight[vocab:] = 50  # loud padding: any leak shows
    return states.to(dtype), weight.to(dtype)


def head_of(name: str, weight: torch.Tensor, chunk_tokens: int = 4, group=None, **groups) -> Head:
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    rows = len(weight) // ranks
    return Head(weight[rank * rows:(rank + 1) * rows], rank * rows, SHAPES[name][0], group, chunk_tokens, **groups)


def dense(name: str, k: int, temperature: float = 1.0) -> Comparison:
    states, weight = (tensor.double() for tensor in case_of(name))
    logits = states @ weight[:SHAPES[name][0]].T / temperature
    logprobs = logits.log_softmax(2)
    ids = logits.sort(dim=2, descending=True, stable=True).indices[:, :, :k]
    kl = [(logprobs[0].exp() * (logprobs[0] - other)).sum(1) for other in logprobs[1:]]
    return Comparison(ids.transpose(0, 1), torch.stack(kl, 1))


def assert_same(found: Comparison, wanted: Comparison, tolerance: float = 1e-12) -> None:
    assert torch.equal(found.topk_ids_TNK, wanted.topk_ids_TNK)
    torch.testing.assert_close(found.kl_TP.double(), wanted.kl_TP.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100, 0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("name", SHAPES)
def test_it_is_the_dense_definition(name, temperature, chunk_tokens):
    states, weight = case_of(name)
    found = compare_policies(states[0], list(states[1:]), head_of(name, weight, chunk_tokens), 4,
                             temperature=temperature)
    assert_same(found, dense(name, 4, temperature))


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_float32(kernels):
    states, weight = case_of("ties", torch.float32)
    found = compare_policies(states[0], list(states[1:]), head_of("ties", weight, kernels=kernels), 4)
    assert found.kl_TP.dtype == torch.float32
    assert_same(found, dense("ties", 4), 1e-5)


def test_equal_policies_are_nothing_apart_and_nobody_else_is_needed():
    states, weight = case_of("even")
    head = head_of("even", weight)
    found = compare_policies(states[0], [states[0].clone()], head, 3)
    assert found.kl_TP.abs().max() == 0 and torch.equal(*found.topk_ids_TNK.unbind(1))
    assert compare_policies(states[0], [], head, 3).kl_TP.shape == (TOKENS, 0)
    assert compare_policies(states[0, :0], [states[1, :0]], head, 3).topk_ids_TNK.shape == (0, 2, 3)


def test_every_policy_passes_the_head_once():
    states, weight = case_of("even")
    states.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        found = compare_policies(states[0], list(states[1:]), head_of("even", weight), 3)
    assert counter.get_total_flops() == 2 * (1 + OTHERS) * TOKENS * HIDDEN * SHAPES["even"][0]
    assert not found.kl_TP.requires_grad


def on_a_rank() -> dict[str, Comparison]:
    found = {}
    for name in SHAPES:
        states, weight = case_of(name)
        if len(weight) % dist.get_world_size() == 0:
            # k is more than a shard has rows.
            head = head_of(name, weight, group=dist.group.WORLD)
            found[name] = compare_policies(states[0], list(states[1:]), head, 5)
    states, weight = case_of("even")
    found["tokens"] = compare_policies(states[0], list(states[1:]),
                                       head_of("even", weight, token_group=dist.group.WORLD), 5)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_rank(ranks):
    results = run_ranks(ranks, on_a_rank)
    assert set(results[0]) == {"tokens", *SHAPES} - (set() if ranks == 2 else {"even", "ties"})
    for result in results:
        for name, found in result.items():
            assert_same(found, dense("even" if name == "tokens" else name, 5))


def test_what_does_not_fit_is_refused():
    states, weight = case_of("even")
    head = head_of("even", weight)
    with pytest.raises(ValueError, match=r"others: \[\(2, 6\)\]; the policy's \(11, 6\)"):
        compare_policies(states[0], [states[1], states[2, :2]], head, 3)
    for k in (0, 14):
        with pytest.raises(ValueError, match=f"k: {k}; between 1 and the vocabulary's 13"):
            compare_policies(states[0], [states[1]], head, k)
    with pytest.raises(ValueError, match="temperature"):
        compare_policies(states[0], [states[1]], head, 3, temperature=0.0)
