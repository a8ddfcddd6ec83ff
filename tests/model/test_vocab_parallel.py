"""The chunked, sharded head against dense float64 autograd: gradients, ties, padding, ranks, memory."""
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from copd_megatron.model.full_divergence import full_divergence
from copd_megatron.model.vocab_parallel import CHUNK_BYTES, Head, chunk_tokens_of, score, shard_logits
from support.ranks import run_ranks

TOKENS, HIDDEN, VOCAB, PADDED, IDS = 11, 6, 13, 16, 4
KINDS = ["reverse", "forward", "jsd"]
WEIGHT = 0.3
Found = dict[str, torch.Tensor]


class Case:
    """Hidden states of a student and a teacher, a padded head, targets and other ids, in float64."""

    def __init__(self, seed: int = 0, vocab: int = VOCAB, padded: int = PADDED, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden, self.teacher = normal(2, TOKENS, HIDDEN)
        self.weight = normal(padded, HIDDEN)
        self.weight[vocab:] = 50  # loud padding: any leak shows
        self.targets = torch.randint(0, vocab, (TOKENS,), generator=generator)
        self.ids = torch.randint(0, vocab, (TOKENS, IDS), generator=generator)
        self.ids[:, 0] = self.targets
        self.pull = normal(TOKENS, 2 + IDS)
        self.vocab = vocab

    def head(self, chunk_tokens: int = 4, group: dist.ProcessGroup | None = None, kernels: str = "reference",
             token_group: dist.ProcessGroup | None = None) -> Head:
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        rows = len(self.weight) // ranks
        shard = self.weight[rank * rows:(rank + 1) * rows].clone()
        return Head(shard, rank * rows, self.vocab, group, chunk_tokens, kernels, token_group)

    def scores_and_gradient(self, head: Head, temperature: float = 0.7, topk: int = 5,
                            entropy_gradient: bool = True) -> Found:
        hidden = self.hidden.clone().requires_grad_()
        found = score(hidden, head, self.targets, temperature=temperature, entropy=True, topk=topk,
                      at_ids_TK=self.ids, entropy_gradient=entropy_gradient)
        values = torch.cat([found.logprobs_T[:, None], found.entropy_T[:, None], found.at_logprobs_TK], 1)
        (values * self.pull).sum().backward()
        top = {"topk_ids": found.topk_ids_TK, "topk": found.topk_logprobs_TK} if topk else {}
        return {"values": values.detach(), "gradient": hidden.grad, **top}

    def divergence_and_gradient(self, head: Head, kind: str) -> Found:
        hidden, teacher = self.hidden.clone().requires_grad_(), self.teacher.clone().requires_grad_()
        found = full_divergence(hidden, teacher, head, kind, temperature=0.7, jsd_weight=WEIGHT,
                                target_ids_T=self.targets)
        (found.value_T * self.pull[:, 0]).sum().backward()
        logprobs = torch.stack([found.logprobs_T, found.teacher_logprobs_T], 1)
        assert teacher.grad is None and not logprobs.requires_grad
        return {"values": found.value_T.detach(), "gradient": hidden.grad, "logprobs": logprobs}


def dense_scores(case: Case, temperature: float = 0.7, topk: int = 5, entropy_gradient: bool = True) -> Found:
    hidden = case.hidden.double().requires_grad_()
    logprobs = (hidden @ case.weight[:case.vocab].double().T / temperature).log_softmax(1)
    ids = torch.cat([case.targets[:, None], case.ids], 1)
    picked, entropy = logprobs.gather(1, ids), -(logprobs.exp() * logprobs).sum(1, keepdim=True)
    entropy = entropy if entropy_gradient else entropy.detach()
    values = torch.cat([picked[:, :1], entropy, picked[:, 1:]], 1)
    (values * case.pull.double()).sum().backward()
    top, top_ids = logprobs.detach().sort(dim=1, descending=True, stable=True)
    return {"values": values.detach(), "topk_ids": top_ids[:, :topk], "topk": top[:, :topk],
            "gradient": hidden.grad}


def dense_divergence(case: Case, kind: str) -> Found:
    hidden = case.hidden.double().requires_grad_()
    weight = case.weight[:case.vocab].double()
    p, q = ((h @ weight.T / 0.7).softmax(1) for h in (hidden, case.teacher.double()))
    m = WEIGHT * q + (1 - WEIGHT) * p
    values = {"reverse": (p * (p / q).log()).sum(1), "forward": (q * (q / p).log()).sum(1),
              "jsd": (WEIGHT * q * (q / m).log() + (1 - WEIGHT) * p * (p / m).log()).sum(1)}[kind]
    (values * case.pull[:, 0].double()).sum().backward()
    return {"values": values.detach(), "gradient": hidden.grad,
            "logprobs": torch.cat([side.detach().log().gather(1, case.targets[:, None]) for side in (p, q)], 1)}


def everything(case: Case, head: Head) -> list[Found]:
    """Scores at temperature 1, where small integers keep exact ties, and every divergence."""
    scores = [case.scores_and_gradient(head, 1.0, topk, entropy_gradient)
              for topk in (5, 0) for entropy_gradient in (True, False)]
    return [*scores, *(case.divergence_and_gradient(head, k) for k in KINDS)]


def assert_same(found: Found, wanted: Found, tolerance: float = 1e-11) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 11, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_scores_and_gradient_equal_the_dense_reference(chunk_tokens, temperature, entropy_gradient):
    case = Case()
    found = case.scores_and_gradient(case.head(chunk_tokens), temperature, entropy_gradient=entropy_gradient)
    assert_same(found, dense_scores(case, temperature, entropy_gradient=entropy_gradient))


@pytest.mark.parametrize("chunk_tokens", [4, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_full_divergence_and_gradient_equal_the_dense_reference(chunk_tokens, kind):
    case = Case()
    assert_same(case.divergence_and_gradient(case.head(chunk_tokens), kind), dense_divergence(case, kind))


@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize(("dtype", "head_dtype", "tolerance"), [
    (torch.float32, torch.float32, 1e-5),
    (torch.float32, torch.bfloat16, 1e-5),
    (torch.bfloat16, torch.bfloat16, 2e-2),
])
def test_float32_and_bfloat16_heads(dtype, head_dtype, tolerance, kernels):
    case = Case(dtype=head_dtype)
    case.hidden, case.pull = case.hidden.to(dtype), case.pull.to(torch.float32)
    for entropy_gradient in (True, False):
        found = case.scores_and_gradient(case.head(kernels=kernels), entropy_gradient=entropy_gradient)
        wanted = dense_scores(case, entropy_gradient=entropy_gradient)
        assert found["values"].dtype == torch.float32 and found["gradient"].dtype == dtype
        torch.testing.assert_close(found["values"].double(), wanted["values"], rtol=1e-5, atol=1e-5)
        gradients = found["gradient"].double(), wanted["gradient"]
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("output", ["logprobs_T", "entropy_T", "at_logprobs_TK"])
def test_each_output_alone_has_its_gradient(output):
    case = Case()
    hidden, dense = case.hidden.clone().requires_grad_(), case.hidden.clone().requires_grad_()
    entropy = output == "entropy_T"
    found = score(hidden, case.head(), case.targets, entropy=entropy, entropy_gradient=entropy,
                  at_ids_TK=case.ids if output == "at_logprobs_TK" else None)
    getattr(found, output).sum().backward()
    logprobs = (dense @ case.weight[:VOCAB].T).log_softmax(1)
    terms = {"logprobs_T": logprobs.gather(1, case.targets[:, None]),
             "at_logprobs_TK": logprobs.gather(1, case.ids), "entropy_T": -logprobs.exp() * logprobs}
    terms[output].sum().backward()
    torch.testing.assert_close(hidden.grad, dense.grad)


def test_what_is_not_asked_for_is_absent_and_the_topk_has_no_gradient():
    case = Case()
    assert full_divergence(case.hidden, case.teacher, case.head()).logprobs_T is None
    plain = score(case.hidden, case.head(), case.targets)
    assert plain.entropy_T is plain.topk_ids_TK is plain.topk_logprobs_TK is plain.at_logprobs_TK is None
    full = score(case.hidden.requires_grad_(), case.head(), case.targets, topk=2, entropy=True)
    assert full.logprobs_T.requires_grad
    assert not full.topk_logprobs_TK.requires_grad and not full.entropy_T.requires_grad


def test_no_gradient_reaches_the_frozen_head():
    case = Case()
    weight = case.weight.clone().requires_grad_()
    hidden = case.hidden.clone().requires_grad_()
    score(hidden, Head(weight, 0, VOCAB, None, 4), case.targets).logprobs_T.sum().backward()
    assert weight.grad is None and hidden.grad.abs().max() > 0


def test_no_tokens():
    case = Case()
    hidden = case.hidden[:0].clone().requires_grad_()
    found = score(hidden, case.head(), case.targets[:0], entropy=True, topk=3, at_ids_TK=case.ids[:0])
    assert found.topk_ids_TK.shape == (0, 3) and found.at_logprobs_TK.shape == (0, IDS)
    divergence = full_divergence(hidden, hidden.detach(), case.head(), target_ids_T=case.targets[:0])
    (found.logprobs_T.sum() + divergence.value_T.sum()).backward()
    assert hidden.grad.shape == (0, HIDDEN) and divergence.logprobs_T.shape == (0,)


def test_shard_logits_leave_the_padding_out():
    case = Case()
    wanted = case.hidden @ case.weight[:VOCAB].T / 0.5
    torch.testing.assert_close(shard_logits(case.hidden, case.head(), 0.5), wanted)


def test_saturated_logits_stay_finite():
    case = Case()
    case.weight *= 1e4
    case.hidden, case.teacher = case.hidden.float(), case.teacher.float()
    case.weight, case.pull = case.weight.float(), case.pull.float()
    for found in everything(case, case.head()):
        assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_identical_hidden_states_diverge_by_nothing(kind):
    case = Case()
    case.teacher = case.hidden
    found = case.divergence_and_gradient(case.head(), kind)
    assert found["values"].abs().max() < 1e-13 and found["gradient"].abs().max() < 1e-13


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.sampled_from(KINDS))
def test_divergences_are_never_negative(seed, chunk_tokens, kind):
    case = Case(seed)
    assert (case.divergence_and_gradient(case.head(chunk_tokens), kind)["values"] >= -1e-12).all()


def test_equal_logits_rank_by_lowest_id():
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [1.0], [2.0], [1.0], [9.0]])
    found = score(hidden, Head(weight, 0, 5, None, 1), torch.tensor([0]), topk=4)
    assert found.topk_ids_TK.tolist() == [[1, 3, 0, 2]]


# ---- several ranks -----------------------------------------------------------------------------------------

RANK_CASES = {"even": (13, 16), "one rank holds only padding": (5, 12), "ties": (13, 16)}


def rank_case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    case = Case(3, *RANK_CASES[name], dtype)
    if name == "ties":  # small integers: exact products, many equal logits within and across shards
        case.hidden, case.weight = case.hidden.sign(), case.weight.round()
    return case


def on_a_rank() -> dict[str, Any]:
    found = {}
    for name in RANK_CASES:
        case = rank_case(name)
        if len(case.weight) % dist.get_world_size():
            continue
        head = case.head(group=dist.group.WORLD)
        found[name] = [*everything(case, head), {"logits": shard_logits(case.hidden, head)}]
    there, found["triton"] = list(found), {}
    for name in there:
        narrow = rank_case(name, torch.float32)
        head = narrow.head(group=dist.group.WORLD, kernels="triton")
        found["triton"][name] = [narrow.scores_and_gradient(head, 1.0, entropy_gradient=on) for on in (True, False)]
    case = rank_case("even")
    found["tokens"] = everything(case, case.head(token_group=dist.group.WORLD))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_rank(ranks):
    results = run_ranks(ranks, on_a_rank)
    for result in results:
        for name, outcomes in result.pop("triton").items():
            for entropy_gradient, found in zip((True, False), outcomes):
                assert_same(found, dense_scores(rank_case(name), 1.0, entropy_gradient=entropy_gradient), 3e-5)
    shared_out = [result.pop("tokens") for result in results]
    for found, alone in zip(zip(*shared_out), everything(rank_case("even"), rank_case("even").head())):
        for own in found:
            assert_same(own, alone, 1e-11)
    assert set(results[0]) == set(RANK_CASES) - (set() if ranks == 2 else {"even", "ties"})
    for name in results[0]:
        case = rank_case(name)
        wanted = everything(case, case.head())
        for result in results:
            for found, alone in zip(result[name], wanted):
                assert_same(found, alone, 1e-11)
        for found, same in zip(results[0][name][:-1], results[1][name]):
            assert all(torch.equal(found[key], same[key]) for key in found), "ranks must agree bit for bit"
        pieces = torch.cat([result[name][-1]["logits"] for result in results], 1)
        torch.testing.assert_close(pieces, case.hidden @ case.weight[:case.vocab].T)
        assert_same(wanted[0], dense_scores(case, 1.0))


# ---- memory ------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("what", ["score", "score with top-k", "full divergence"])
def test_no_tensor_has_tokens_times_vocabulary_elements(what):
    tokens, vocab, chunk = 192, 512, 16
    weight, targets = torch.randn(vocab, 8), torch.randint(0, vocab, (tokens,))

    def largest(chunk_tokens: int) -> int:
        hidden, head = torch.randn(tokens, 8, requires_grad=True), Head(weight, 0, vocab, None, chunk_tokens)
        with LargestTensor() as meter:
            if what == "full divergence":
                loss = full_divergence(hidden, torch.randn(tokens, 8), head, "jsd", target_ids_T=targets).value_T.sum()
            else:
                topk = 4 if what == "score with top-k" else 0
                found = score(hidden, head, targets, entropy=True, topk=topk)
                loss = found.logprobs_T.sum()
            loss.backward()
        return meter.elements

    assert largest(chunk) == chunk * vocab
    assert largest(tokens) == tokens * vocab, "the meter must see the logits when they are not chunked"


def test_chunks_left_open_are_bounded_by_memory():
    head = Head(torch.zeros(151_936, 1), 0, 151_936)
    chunks = list(head.chunks(torch.zeros(500, 1)))
    assert chunks == [slice(0, 165), slice(165, 330), slice(330, 495), slice(495, 500)]
    assert 165 * 151_936 * 4 <= CHUNK_BYTES["cpu"] < 166 * 151_936 * 4
    assert chunk_tokens_of(0, 151_936, 4, "cuda") == 883 and chunk_tokens_of(0, 151_936, 4, "meta") == 165
    assert [c.stop for c in head.chunks(torch.zeros(500, 1, dtype=torch.float64))][0] == 82
    assert list(replace(head, chunk_tokens=300).chunks(torch.zeros(500, 1))) == [slice(0, 300), slice(300, 500)]
    assert chunk_tokens_of(0, 10**12, 4, "cuda") == 1


def products_of(work: Callable[[torch.Tensor], torch.Tensor], differentiate: bool) -> float:
    """How often the head is multiplied with all tokens."""
    case = Case()
    with FlopCounterMode(display=False) as counter:
        loss = work(case.hidden.clone().requires_grad_(differentiate))
        if differentiate:
            loss.sum().backward()
    return counter.get_total_flops() / (2 * TOKENS * HIDDEN * VOCAB)


def test_logits_are_made_once_and_no_gradient_is_taken_where_none_is_wanted():
    case = Case()
    for topk in (0, 3):
        def logprobs(hidden: torch.Tensor, k: int = topk) -> torch.Tensor:
            return score(hidden, case.head(), case.targets, entropy=True, topk=k, at_ids_TK=case.ids).at_logprobs_TK

        assert (products_of(logprobs, False), products_of(logprobs, True)) == (1, 2)

    for targets in (None, case.targets):
        def divergence(hidden: torch.Tensor, ids: torch.Tensor | None = targets) -> torch.Tensor:
            return full_divergence(hidden, case.teacher, case.head(), target_ids_T=ids).value_T

        assert (products_of(divergence, False), products_of(divergence, True)) == (2, 3)
    assert products_of(lambda hidden: score(hidden, case.head(), case.targets, entropy=True,
                                            entropy_gradient=True).entropy_T, True) == 3


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"target_ids_T": torch.full((TOKENS,), VOCAB)}, "target_ids_T, at_ids_TK: an id outside 0 to 12"),
    ({"target_ids_T": torch.full((TOKENS,), -1)}, "an id outside 0 to 12"),
    ({"at_ids_TK": torch.full((TOKENS, 1), PADDED)}, "an id outside 0 to 12"),
    ({"target_ids_T": torch.zeros(3, dtype=torch.long)}, "one each"),
    ({"hidden_TH": torch.zeros(TOKENS, HIDDEN + 1)}, "hidden_TH"),
    ({"temperature": 0.0}, "temperature"),
    ({"topk": VOCAB + 1}, "topk"),
])
def test_bad_scores(change, message):
    case = Case()
    good = {"hidden_TH": case.hidden, "head": case.head(), "target_ids_T": case.targets}
    with pytest.raises((ValueError, RuntimeError), match=message):
        score(**(good | change))


def test_bad_divergences_and_heads():
    case = Case()
    with pytest.raises(ValueError, match="teacher_hidden_TH"):
        full_divergence(case.hidden, case.teacher[:2], case.head())
    with pytest.raises(RuntimeError, match="an id outside 0 to 12"):
        full_divergence(case.hidden, case.teacher, case.head(), target_ids_T=torch.full((TOKENS,), VOCAB))
    with pytest.raises(ValueError, match="reverse, forward or jsd"):
        full_divergence(case.hidden, case.teacher, case.head(), "kl")
    with pytest.raises(ValueError, match="jsd_weight"):
        full_divergence(case.hidden, case.teacher, case.head(), "jsd", jsd_weight=0.0)
    with pytest.raises(ValueError, match="needs its group"):
        Head(case.weight[:4], 0, VOCAB)
    with pytest.raises(ValueError, match="chunk_tokens"):
        Head(case.weight, 0, VOCAB, None, -1)
    with pytest.raises(ValueError, match="weight"):
        Head(case.weight.long(), 0, VOCAB)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["reference", "triton"])
@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_bfloat16_head_on_a_gpu(kernels, entropy_gradient):
    case = Case(dtype=torch.bfloat16)
    wanted = dense_scores(case, entropy_gradient=entropy_gradient)
    for name in ("hidden", "weight", "targets", "ids"):
        setattr(case, name, getattr(case, name).cuda())
    case.pull = case.pull.float().cuda()
    scored = case.scores_and_gradient(case.head(kernels=kernels), entropy_gradient=entropy_gradient)
    found = {name: value.cpu() for name, value in scored.items()}
    torch.testing.assert_close(found["values"].double(), wanted["values"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["gradient"].double(), wanted["gradient"], rtol=5e-2, atol=5e-2)
