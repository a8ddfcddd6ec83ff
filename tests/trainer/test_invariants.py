"""What must hold of CoPD whatever the task: identical experts, no exchange, one expert, hub and spokes, symmetry."""
import pytest
import torch

from copd_megatron.trainer import scoring
from copd_megatron.trainer.batching import Lane, make_microbatches
from copd_megatron.trainer.merge import MERGED, all_policies
from support.toy_run import randomise, run_steps, toy_config, toy_trainer
from support.toy_tasks import LetterTask

PAIR = ("text", "image")


class AlwaysRight(LetterTask):
    """Every answer earns the same, so that rewards teach nothing."""

    def verify(self, item, completion):
        return {"accuracy": 1.0, "format": 1.0}


def text_config(experts=PAIR, **sections):
    """Experts that all read text: cheap, and any may teach any."""
    return toy_config("qwen3", experts, **{"metrics": {"rollouts": False, "overlap_tokens": 1}, **sections})


def largest_gap(one: dict, other: dict) -> float:
    """Between two sets of experts' factors, by name."""
    assert one.keys() == other.keys()
    return max(float((a - other[e][n]).abs().max()) for e, own in one.items() for n, a in own.items())


@pytest.mark.parametrize("opd", [{"signal": "sampled"}, {"signal": "topk", "topk": 4}, {"signal": "full"},
                                 {"signal": "student_topk", "topk": 4},
                                 {"signal": "topk", "topk": 4, "divergence": "forward"},
                                 {"signal": "full", "divergence": "jsd"}], ids=str)
def test_identical_experts_have_nothing_to_teach(opd, tmp_path):
    config = text_config(task=AlwaysRight, opd=opd, schedule={"rl_steps": 0}, metrics={"rollouts": False})
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer, alike=True)
        metrics = trainer.train_step(0, "opd")
    for teacher, student in (PAIR, PAIR[::-1]):
        assert metrics[f"edge/{teacher}->{student}/tokens"] > 0
        for name in ("delta_p05", "delta_p50", "delta_p95", "beta_delta_abs", "teacher_kl"):
            assert metrics[f"edge/{teacher}->{student}/{name}"] == pytest.approx(0, abs=1e-12)
        assert metrics[f"{student}/grad_norm"] < 1e-12


def test_different_experts_have(tmp_path):
    config = text_config(task=AlwaysRight, schedule={"rl_steps": 0})
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        metrics = trainer.train_step(0, "opd")
    assert metrics["edge/text->image/delta_p05"] < -1e-3 < 1e-3 < metrics["edge/text->image/beta_delta_abs"]
    assert metrics["image/grad_norm"] > 1e-3


def test_without_edges_opd_steps_are_plain_grpo_bit_for_bit(tmp_path):
    results = [run_steps(text_config(**sections), tmp_path / str(i)) for i, sections in enumerate((
        {"schedule": {"rl_steps": 2, "opd_steps": 0}},
        {"schedule": {"rl_steps": 1, "opd_steps": 1}, "exchange": {"topology": "none"}}))]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert largest_gap(results[0]["adapters"], results[1]["adapters"]) == 0


def test_one_expert_is_grpo(tmp_path):
    """With nobody to talk to, OPD steps change nothing, and neither do independent experts beside it."""
    alone = run_steps(text_config(("text",)), tmp_path / "alone")
    rl_only = run_steps(text_config(("text",), schedule={"rl_steps": 2, "opd_steps": 0}), tmp_path / "rl")
    beside = run_steps(text_config(exchange={"topology": "none"}), tmp_path / "beside")
    assert largest_gap(alone["adapters"], rl_only["adapters"]) == 0
    assert largest_gap(alone["adapters"], {"text": beside["adapters"]["text"]}) < 1e-12
    for one, other in zip(alone["tokens"], beside["tokens"]):
        assert one == {key: ids for key, ids in other.items() if key[0] == "text"}
    assert not any(name.startswith(("edge/", "pair/")) for name in alone["metrics"][1])


def test_spokes_never_score_each_other(tmp_path, monkeypatch):
    asked = []
    begin = scoring.Exchange.open.__func__

    def remember(cls, requests, *others):
        asked.extend(requests)
        return begin(cls, requests, *others)

    monkeypatch.setattr(scoring.Exchange, "open", classmethod(remember))
    with toy_trainer(toy_config(schedule={"rl_steps": 0}, metrics={"rollouts": False}), tmp_path) as trainer:
        metrics = trainer.train_step(0, "opd")
        lanes = {(r.teacher, r.student) for r in asked}
        # Students answer their teachers' own prompts of this very step.
        edges = trainer.schedule.edges(0)
        for r in asked:
            own = {trainer.native.source.train(r.teacher, slot).key for slot in range(3)}
            assert trainer.cross.prompt(edges, r.teacher, r.student, 0, r.prompt).key in own
    assert {name.split("/")[1] for name in metrics if name.startswith("edge/")} == {f"{t}->{s}" for t, s in lanes}


def test_merging_identical_experts_is_the_identity(tmp_path):
    with toy_trainer(text_config(), tmp_path) as trainer:
        randomise(trainer, alike=True)
        samples = trainer.native.samples(*_asked_and_groups(trainer))
        bank, runner = trainer.runner.backbone.bank, trainer.runner
        hidden = {}
        with all_policies(bank, trainer.groups, trainer.experts, trainer.config.merge) as policies:
            assert policies == ["text", "image", MERGED]
            for policy in (*policies, None):
                batches = make_microbatches([Lane(s, policy) for s in samples], runner.backbone.rules, 500)
                hidden[policy] = torch.cat(runner.score(batches, lambda h, pack, batch: (None, h)))
    for policy in ("image", MERGED):
        torch.testing.assert_close(hidden[policy], hidden["text"], rtol=0, atol=1e-11)
    assert (hidden[None] - hidden["text"]).abs().max() > 1e-3


def _asked_and_groups(trainer):
    asked = trainer.native.requests(0)
    return asked, trainer.collector.collect([a.request for a in asked])


@pytest.mark.parametrize("signal", ["sampled", "full"])
def test_full_topology_does_not_depend_on_the_order_of_experts(signal, tmp_path):
    sections = {"exchange": {"topology": "full"}, "opd": {"signal": signal}}
    one = run_steps(text_config(PAIR, **sections), tmp_path / "one")
    other = run_steps(text_config(PAIR[::-1], **sections), tmp_path / "other")
    assert one["tokens"] == other["tokens"]
    assert largest_gap(one["adapters"], other["adapters"]) < 1e-10
