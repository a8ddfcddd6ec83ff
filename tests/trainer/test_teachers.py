"""Frozen teachers and the backbone teach as live experts do, by the same formulas, on prompts that are asked once."""
import pytest
import torch

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import save_peft_adapter
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.trainer.opd_phase import cross_shares
from copd_megatron.types import BACKBONE, Edge, UserError
from support.plain_copd import PlainCopd
from support.plain_model import PlainModel
from support.tiny_models import tiny_model
from support.toy_run import randomise, toy_config, toy_trainer
from support.watched_step import one_step

EXPERTS = ("text", "image")
MIXED = [["old", "text"], [BACKBONE, "text"], {"teacher": BACKBONE, "student": "image", "prompts": "text"},
         ["text", "image"]]


def make_config(topology, folder, **sections):
    return toy_config("qwen3", EXPERTS, **{
        "exchange": {"topology": topology, "frozen_teachers": {"old": str(folder)}},
        "rollout": {"prompts_per_step": 4, "group_size": 2}, "schedule": {"rl_steps": 0, "opd_steps": 1},
        "optimizer": {"lr": 0.03, "warmup_steps": 0, "microbatch_tokens": 300},
        "metrics": {"rollouts": False, "overlap_tokens": 1}, **sections})


def save_expert(folder, expert: str, experts=EXPERTS) -> dict[str, torch.Tensor]:
    """A PEFT folder with the factors that ``randomise`` gives an expert."""
    config = toy_config("qwen3", experts, metrics={"rollouts": False})
    with toy_trainer(config, folder / "unused") as trainer:
        randomise(trainer)
        bank = trainer.runner.backbone.bank
        factors = {name: p.detach().clone() for name, p in bank.parameters_of(expert).items()}
        save_peft_adapter(folder, Adapter(factors, bank.scaling_of(expert)), TEXT_PREFIX["qwen3"], tiny_model("qwen3"))
    return factors


@pytest.mark.parametrize("signal", ["topk", "full"])
def test_gradients_are_those_of_the_formulas(signal, tmp_path):
    old = save_expert(tmp_path / "old", "video", ("video",))
    config = make_config(MIXED, tmp_path / "old", opd={"signal": signal, "topk": 5, "beta": 0.7})
    metrics, samples, start, gradients = one_step(config, tmp_path / "run")
    model = PlainModel(tiny_model("qwen3"), scaling=2.0)
    plain = PlainCopd(config, model, {**start, "old": old, BACKBONE: None}, None)
    for expert in EXPERTS:
        own = [s for s in samples if s.expert == expert]
        want = plain.gradient(own, samples, start[expert])
        for name, gradient in gradients[expert].items():
            torch.testing.assert_close(gradient, want[name], rtol=0, atol=1e-8, msg=f"{expert} {name}")
    if signal == "full":
        cross = [s for s in samples if s.edge and (s.edge.teacher, s.edge.student) == (BACKBONE, "text")]
        mean = float(torch.cat([_kl(model, s, start["text"]) for s in cross]).mean())
        assert metrics["edge/backbone->text/teacher_kl"] == pytest.approx(mean, abs=1e-9)


def _kl(model, sample, factors) -> torch.Tensor:
    """[R] KL(student || backbone), written out."""
    prompt, answer = sample.completion.prompt.token_ids.tolist(), sample.completion.token_ids
    student, backbone = (model.logprobs(prompt, answer, f, 1.0, 0) for f in (factors, None))
    return (student.exp() * (student - backbone)).sum(1)


def test_prompts_are_asked_once_and_own_ones_answered_anew(tmp_path):
    save_expert(tmp_path / "old", "text")
    _, samples, _, _ = one_step(make_config(MIXED, tmp_path / "old"), tmp_path / "run")
    by_edge = {}
    for sample in samples:
        key = (sample.edge.teacher, sample.edge.student) if sample.edge else sample.expert
        by_edge.setdefault(key, {})[sample.completion.prompt.key, sample.completion.sample] = sample.completion
    asked = {key: sorted({prompt for prompt, _ in own}) for key, own in by_edge.items()}
    assert asked["text"] == [f"a/train/{i}" for i in range(4)]
    assert asked["old", "text"] == asked["text", "image"] == asked["text"][:2]
    assert asked[BACKBONE, "text"] == asked[BACKBONE, "image"] == asked["text"][2:]
    # The student answers its own questions a second time, with other noise.
    again = by_edge["old", "text"] | by_edge[BACKBONE, "text"]
    assert again.keys() == by_edge["text"].keys()
    assert sum(c.token_ids != by_edge["text"][key].token_ids for key, c in again.items()) >= 6


def test_a_frozen_copy_of_the_student_has_nothing_to_teach(tmp_path):
    save_expert(tmp_path / "old", "text")
    metrics, _, _, _ = one_step(make_config([["old", "text"], ["old", "image"]], tmp_path / "old"), tmp_path / "run")
    for name in ("delta_p05", "delta_p95", "beta_delta_abs", "teacher_kl"):
        assert metrics[f"edge/old->text/{name}"] == pytest.approx(0, abs=1e-12)
        assert abs(metrics[f"edge/old->image/{name}"]) > 1e-3
    assert metrics["edge/old->text/tokens"] > 0


def test_a_fresh_expert_is_the_backbone(tmp_path):
    config = make_config([[BACKBONE, "text"]], tmp_path, exchange={"topology": [[BACKBONE, "text"]]})
    with toy_trainer(config, tmp_path / "run") as trainer:
        metrics = trainer.train_step(0, "opd")
    assert metrics["edge/backbone->text/beta_delta_abs"] == 0


def test_shares_of_edges_that_ask_the_same_prompts():
    edges = [Edge("old", "text"), Edge(BACKBONE, "text"), Edge("image", "text")]
    shares = cross_shares(edges, "text", 6, 1.0, EXPERTS)
    assert [(s.domain, s.first, s.count) for s in shares] == [("text", 0, 2), ("text", 2, 2), ("image", 0, 2)]
    assert [(s.first, s.count) for s in cross_shares(edges[:2], "text", 3, 9.0, EXPERTS)] == [(0, 3), (3, 3)]


def test_shares_of_the_students_own_prompts_and_of_both():
    edges = [Edge("image", "text"), Edge("video", "text"), Edge("old", "text"), Edge("video", "text", prompts="image")]

    def shares(whose, *some, native=10, ratio=1.0):
        return [(s.domain, s.first, s.count, list(s.slots)) for s in cross_shares(some, "text", native, ratio,
                                                                                 ("text", "image", "video"), whose)]

    assert shares("student", *edges[:2]) == [("text", 0, 5, [0, 1, 2, 3, 4]), ("text", 5, 5, [0, 1, 2, 3, 4])]
    assert shares("both", *edges[:2]) == [("image", 0, 3, [0, 1, 2]), ("text", 0, 2, [3, 4]),
                                          ("video", 0, 3, [0, 1, 2]), ("text", 2, 2, [3, 4])]
    assert shares("both", *edges[2:], native=4) == [("text", 0, 2, [0, 1]), ("image", 0, 2, [0, 1])]
    assert shares("both", edges[0], ratio=0.1) == [("image", 0, 1, [0]), ("text", 0, 0, [])]


def test_a_folder_that_is_no_adapter_is_refused_before_weights_are_read(tmp_path):
    complaint = r"^exchange\.frozen_teachers\.old: .* has no adapter_config\.json; allowed is a PEFT"
    with pytest.raises(UserError, match=complaint), toy_trainer(make_config(MIXED, tmp_path), tmp_path / "run"):
        pass
