"""Tokens drawn from a sharded head: exact against a dense reference, well distributed, equal on all ranks."""
from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from copd_megatron.model.vocab_parallel import Head
from copd_megatron.parallel.seeding import uniform
from copd_megatron.rollout.sampling import LaneSampling, sample
from support.ranks import run_ranks

HIDDEN, VOCABULARY, LANES = 8, 37, 24


def settings(lanes, temperature=1.0, top_p=1.0, greedy=False):
    return LaneSampling(*(np.broadcast_to(np.asarray(x), lanes).copy() for x in (temperature, top_p, greedy)))


def make(vocabulary=VOCABULARY, lanes=LANES, dtype=torch.float64, seed=0):
    """Weight [V, H] and hidden states [L, H] whose softmax is neither flat nor a point."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, HIDDEN, dtype=torch.float64, generator=generator) * 0.6
    hidden = torch.randn(lanes, HIDDEN, dtype=torch.float64, generator=generator)
    return weight.to(dtype), hidden.to(dtype)


def noise(lanes=LANES, seed=1):
    return torch.from_numpy(uniform(seed, np.arange(lanes)))


def dense(weight, hidden, how, u, training):
    """Token, log-prob and sampled log-prob of each lane by sorting and one cumulative sum over all tokens."""
    logits = (hidden.double() @ weight.double().T).numpy()
    rows = []
    for lane, z in enumerate(logits):
        policy = z / training - np.logaddexp.reduce(z / training)
        if how.greedy_L[lane]:
            rows.append((z.argmax(), policy.max(), 0.0))
            continue
        drawn = z / how.temperature_L[lane]
        probs = np.exp(drawn - np.logaddexp.reduce(drawn))
        order = np.argsort(-probs, kind="stable")
        out = order[np.cumsum(probs[order]) - probs[order] >= how.top_p_L[lane]]
        probs[out] = 0.0
        probs /= probs.sum()
        token = int((np.cumsum(probs) <= u[lane].item()).sum())
        rows.append((token, policy[token], np.log(probs[token])))
    return [np.array(column) for column in zip(*rows)]


def check(got, want, atol):
    assert got.token_ids_L.tolist() == want[0].tolist()
    np.testing.assert_allclose(got.logprobs_L.double(), want[1], rtol=0, atol=atol)
    np.testing.assert_allclose(got.sampled_logprobs_L.double(), want[2], rtol=0, atol=atol)


MIXED = settings(LANES, np.resize([1.0, 0.5, 1.7], LANES), np.resize([1.0, 0.6, 0.25, 0.9], LANES),
                 np.resize([False, False, False, False, True], LANES))
HOW = {"plain": settings(LANES), "hot": settings(LANES, 1.8), "nucleus": settings(LANES, 1.0, 0.5),
       "greedy": settings(LANES, greedy=True), "mixed": MIXED}


@pytest.mark.parametrize("dtype,atol", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("training", [1.0, 0.7])
@pytest.mark.parametrize("how", HOW)
def test_equals_the_dense_reference(how, training, dtype, atol):
    weight, hidden = make(dtype=dtype)
    u = noise()
    got = sample(hidden, Head(weight, 0, VOCABULARY), HOW[how], u, training)
    assert got.logprobs_L.dtype == got.sampled_logprobs_L.dtype == dtype
    check(got, dense(weight, hidden, HOW[how], u, training), atol)


def test_chunks_of_lanes_change_nothing():
    weight, hidden = make()
    whole = sample(hidden, Head(weight, 0, VOCABULARY), MIXED, noise(), 1.0)
    cut = sample(hidden, Head(weight, 0, VOCABULARY, chunk_tokens=5), MIXED, noise(), 1.0)
    assert whole.token_ids_L.equal(cut.token_ids_L)
    torch.testing.assert_close(whole.sampled_logprobs_L, cut.sampled_logprobs_L, rtol=0, atol=1e-14)


def test_no_lanes():
    weight, hidden = make(lanes=0)
    assert sample(hidden, Head(weight, 0, VOCABULARY), settings(0), noise(0), 1.0).token_ids_L.shape == (0,)


def _on_rank(vocabulary, rows):
    """What this rank draws when ``rows`` rows of the padded vocabulary lie on each rank."""
    rank = dist.get_rank()
    weight, hidden = make(vocabulary)
    # Padding rows point where the hidden states do: they would win if they took part.
    padded = torch.cat([weight, 100 * hidden.mean(0).expand(64, -1)])[:rows * dist.get_world_size()]
    head = Head(padded[rank * rows:(rank + 1) * rows], rank * rows, vocabulary, dist.group.WORLD)
    return [tuple(sample(hidden, head, how, noise(), 0.9)) for how in HOW.values()]


@pytest.mark.parametrize("ranks,vocabulary,rows", [(2, 37, 19), (3, 37, 13), (3, 4, 2)],
                         ids=["tp2", "tp3", "a-rank-of-padding"])
def test_shards_draw_what_the_whole_draws(ranks, vocabulary, rows):
    weight, hidden = make(vocabulary)
    results = run_ranks(ranks, _on_rank, vocabulary, rows)
    for number, how in enumerate(HOW.values()):
        want = sample(hidden, Head(weight, 0, vocabulary), how, noise(), 0.9)
        for result in results:
            assert result[number][0].equal(want.token_ids_L)
            assert all(mine.equal(first) for mine, first in zip(result[number], results[0][number]))
            torch.testing.assert_close(result[number][1:], tuple(want)[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("u", [1e-16, 1 - 2.0**-54])
@pytest.mark.parametrize("top_p", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_at_the_ends_draws_a_token_with_mass(u, top_p, dtype):
    """Rounding must not leave the vocabulary, nor the nucleus, on either side."""
    weight, hidden = make(dtype=dtype)
    how = settings(LANES, 1.0, top_p)
    got = sample(hidden, Head(weight, 0, VOCABULARY), how, torch.full((LANES,), u, dtype=torch.float64), 1.0)
    assert got.sampled_logprobs_L.isfinite().all()
    logits = hidden @ weight.T
    as_likely = (logits >= logits.gather(1, got.token_ids_L[:, None])).sum(1)
    assert top_p == 1 or (as_likely <= 0.3 * VOCABULARY + 1).all()
    expected = torch.zeros(LANES) if u < 0.5 else torch.full((LANES,), VOCABULARY - 1)
    assert top_p < 1 or got.token_ids_L.equal(expected.long())


def test_equal_logits():
    """Greedy takes the lowest id; a nucleus keeps all tokens that tie with its last one."""
    weight = torch.zeros(6, HIDDEN, dtype=torch.float64)
    weight[2:5, 0] = 3.0
    hidden = torch.ones(400, HIDDEN, dtype=torch.float64)
    head = Head(weight, 0, 6)
    assert set(sample(hidden, head, settings(400, greedy=True), noise(400), 1.0).token_ids_L.tolist()) == {2}
    tied = sample(hidden, head, settings(400, 1.0, 0.4), noise(400), 1.0)
    assert set(tied.token_ids_L.tolist()) == {2, 3, 4}
    torch.testing.assert_close(tied.sampled_logprobs_L, torch.full((400,), -np.log(3.0), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [1e-3, 0.5, 0.99, 1 - 1e-6])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(scale, top_p, dtype):
    """From nearly flat to nearly a point, over a larger vocabulary, against sorting in float64."""
    weight, hidden = make(500, 30, dtype)
    hidden = hidden * scale
    probs = (hidden @ weight.T).double().softmax(1).sort(1, descending=True).values
    before = probs.cumsum(1) - probs
    sizes = (before < top_p).sum(1)
    # Where the mass before the cut is top_p up to rounding, either size is right.
    clear = ((before - top_p).abs() > (1e-6 if dtype == torch.float32 else 1e-13)).all(1)
    got = sample(hidden, Head(weight, 0, 500), settings(30, 1.0, top_p), noise(30), 1.0)
    kept = (got.logprobs_L - got.sampled_logprobs_L).double().exp()
    want = torch.where(torch.arange(500) < sizes[:, None], probs, 0).sum(1)
    assert clear.sum() > 5 or (scale, dtype) == (30.0, torch.float32)
    atol = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(kept[clear], want[clear], rtol=0, atol=atol)


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8)])
def test_frequencies(temperature, top_p):
    """Pearson's chi-square over 20,000 draws; mean f, variance 2f for f degrees of freedom."""
    draws = 20_000
    weight, hidden = make(lanes=1)
    how = settings(draws, temperature, top_p)
    got = sample(hidden.expand(draws, -1), Head(weight, 0, VOCABULARY), how, noise(draws), 1.0)
    probs = ((hidden @ weight.T)[0] / temperature).softmax(0)
    order = probs.argsort(descending=True)
    outside = order[(probs[order].cumsum(0) - probs[order]) >= top_p]
    probs[outside] = 0
    expected = draws * probs / probs.sum()
    counts = torch.bincount(got.token_ids_L, minlength=VOCABULARY)
    assert counts[outside].sum() == 0
    inside = expected > 0
    chi_square = ((counts - expected) ** 2 / expected)[inside].sum()
    freedom = int(inside.sum()) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
