"""The head's scores in the loss are their definitions, and no token's logits are made more often than they must."""
import pytest
import torch

from copd_kernels.vocab_topk import reference
from support.head_products import HeadProducts
from support.plain_copd import divergence
from support.tiny_models import VOCABULARY
from support.toy_run import randomise, toy_config, toy_trainer

EXPERTS = ("text", "image", "video", "audio")
EDGES = [{"teacher": "text", "student": "image", "signal": "sampled"},
         {"teacher": "image", "student": "text", "signal": "topk"},
         {"teacher": "text", "student": "video", "signal": "full"},
         {"teacher": "image", "student": "audio", "signal": "student_topk"}]
PRODUCTS = {"native": 2, "sampled": 2, "topk": 2, "student_topk": 2, "full": 3}
"""With the head, per token of an update: logits and their gradient, and for ``full`` the teacher's logits."""
SCORED = {"student_topk": 2, "full": 0}
"""The same in scoring, where it is not 1."""


def make_config(**sections):
    return toy_config("qwen3", EXPERTS, **{
        "exchange": {"topology": EDGES}, "schedule": {"rl_steps": 0, "opd_steps": 1},
        "optimizer": {"lr": 0.01, "microbatch_tokens": 5000}, "metrics": {"rollouts": False, "overlap_tokens": 1},
        **sections})


def kind_of(sample) -> str:
    return sample.edge.signal if sample.edge else "native"


def plain_scores(config, sample, hidden, weight, ids):
    """[R, 4]: log-probs, entropy, divergence, the teacher's log-probs, from logits of the whole vocabulary."""
    kind, opd = kind_of(sample), config.opd
    every = (hidden @ weight.T / config.rollout.temperature).log_softmax(1)
    own, none = every.gather(1, ids[:, None])[:, 0], torch.zeros(len(ids), dtype=every.dtype)
    said = none if kind == "native" else sample.signal.logprobs_T
    if kind in ("native", "sampled"):
        entropy = -(every.exp() * every).sum(1)
        if kind == "sampled" or not config.rlvr.entropy_coef:
            entropy = entropy.detach()
        return torch.stack([own, entropy, none, said], 1)
    if kind == "full":
        teacher = (sample.signal.hidden_TH @ weight.T / config.rollout.temperature).log_softmax(1)
        return torch.stack([own.detach(), none, divergence(every, teacher, opd.divergence, opd.jsd_weight),
                            teacher.gather(1, ids[:, None])[:, 0]], 1)
    head = every.gather(1, sample.signal.topk_ids_TK)
    student = torch.cat([head, torch.log1p(-head.exp().sum(1, keepdim=True))], 1)
    teacher = torch.cat([sample.signal.topk_logprobs_TK, sample.signal.log_tail_T[:, None]], 1)
    return torch.stack([own, none, divergence(student, teacher, opd.divergence, opd.jsd_weight), said], 1)


@pytest.mark.parametrize("entropy_coef, kind", [(0.0, "reverse"), (0.2, "jsd")])
def test_scores_and_gradients_are_their_definitions(entropy_coef, kind, tmp_path):
    """All signals in one microbatch, in float64."""
    config = make_config(rlvr={"entropy_coef": entropy_coef}, rollout={"temperature": 0.7},
                         opd={"topk": 5, "divergence": kind, "jsd_weight": 0.3})
    seen = []
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        objective, weight = trainer.learner.objective, trainer.runner.backbone.head.real_weight
        scores = objective.scores

        def compared(rows, hidden, ids):
            states = [hidden.detach().clone().requires_grad_() for _ in range(2)]
            found = scores(rows, states[0], ids)
            parts = zip(rows.samples, states[1].split(rows.lengths), ids.split(rows.lengths))
            want = torch.cat([plain_scores(config, sample, own, weight, tokens) for sample, own, tokens in parts])
            found = torch.stack([found.logprobs_N, found.entropy_N, found.divergence_N, found.teacher_logprobs_N], 1)
            pull = torch.linspace(-1, 2, want.numel(), dtype=want.dtype).view_as(want)
            gradients = [torch.autograd.grad((value * pull).sum(), own)[0] for value, own in zip((found, want), states)]
            seen.append(({kind_of(s) for s in rows.samples}, found.detach(), want.detach(), *gradients))
            return scores(rows, hidden, ids)

        objective.scores = compared
        trainer.train_step(0, "opd")
    (kinds, found, want, gradient, wanted), = seen
    assert kinds == PRODUCTS.keys()
    torch.testing.assert_close(found, want, rtol=0, atol=1e-11)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-11)
    assert wanted.abs().max() > 1e-2


@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
@pytest.mark.parametrize("microbatch_tokens", [60, 5000])
def test_no_token_passes_the_head_more_often_than_it_must(entropy_coef, microbatch_tokens, tmp_path, monkeypatch):
    """Scoring: one product per lane, of the backbone or a teacher, and of students that say their ids first; none for
    states whose student will multiply them. Top-k ids are looked for where somebody wants them."""
    config = make_config(rlvr={"entropy_coef": entropy_coef}, opd={"topk": 5},
                         optimizer={"lr": 0.01, "microbatch_tokens": microbatch_tokens})
    products, samples, batches, sorted_rows = HeadProducts(VOCABULARY), [], [], []
    topk = reference.vocab_topk
    monkeypatch.setattr(reference, "vocab_topk",
                        lambda logits, *rest: sorted_rows.append(len(logits)) or topk(logits, *rest))
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        score, update, runner = trainer.scoring.score, trainer.learner.update, trainer.runner
        rows = {}

        def scored(given, *others):
            samples.extend(given)
            sorted_rows.clear()
            sums, rows["scoring"] = products.of(lambda: score(given, *others))
            rows["sorted"] = sum(sorted_rows)
            return sums

        def updated(*given):
            sums, rows["update"] = products.of(lambda: update(*given))
            return sums

        trainer.scoring.score, trainer.learner.update = scored, updated
        runner.on_run = lambda given, differentiated: batches.append((len(given), differentiated))
        trainer.train_step(0, "opd")
    assert {kind_of(s) for s in samples} == PRODUCTS.keys()
    assert (max(count for count, differentiated in batches if differentiated) > 1) == (microbatch_tokens == 60)
    bonus = {"native": 1} if entropy_coef else {}  # its gradient makes the logits again
    assert rows["update"] == sum(s.length * (PRODUCTS[kind_of(s)] + bonus.get(kind_of(s), 0)) for s in samples)
    assert rows["scoring"] == sum(s.length * SCORED.get(kind_of(s), 1) for s in samples)
    assert rows["sorted"] == sum(s.length for s in samples if "topk" in kind_of(s))
