"""Every topology, schedule and placement trains the same experts on one rank and on several, and after a resume."""
import pytest
import torch

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import save_peft_adapter
from copd_megatron.model.translate import TEXT_PREFIX
from support.ranks import run_ranks
from support.tiny_models import tiny_model
from support.toy_run import adapters_of, randomise, run_steps, toy_config, toy_trainer

WEIGHTS = {"text": 1.0, "image": 5.0, "video": 2.0, "audio": 2.0, "chess": 1.0}


def make_config(count: int, weighted: bool = False, **sections):
    """``count`` experts that read text; ``weighted``: with very different weights."""
    config = toy_config("qwen3", tuple(WEIGHTS)[:count], **{
        "rollout": {"prompts_per_step": 3, "group_size": 2}, "metrics": {"rollouts": False, "overlap_tokens": 9},
        **sections})
    heavy = {name: expert.model_copy(update={"weight": WEIGHTS[name]}) for name, expert in config.experts.items()}
    return config.model_copy(update={"experts": heavy}) if weighted else config


ADAPTIVE = {"exchange": {"topology": "adaptive(1)"},
            "schedule": {"kind": "adaptive", "rl_steps": 2, "opd_steps": 3, "rl_steps_of": {"video": 1},
                         "enter_overlap": 0.95, "leave_overlap": 0.98, "rl_length": [1, 2], "opd_length": [1, 2]}}
CASES = {
    "expander, weighted co-hosting": (3, 5, True, {
        "exchange": {"topology": "expander(2)"}, "opd": {"prompts": "both"}}),
    "gossip, weighted blocks, an uneven number": (4, 3, True, {
        "exchange": {"topology": "gossip"}, "schedule": {"rl_steps": 0, "opd_steps": 1}}),
    "frozen teachers": (3, 2, True, {
        "exchange": {"topology": [["old", "text"], ["backbone", "image"], ["text", "image"]]},
        "opd": {"signal": "topk", "topk": 6}, "rollout": {"prompts_per_step": 5, "group_size": 2}}),
    "own numbers of steps": (2, 3, False, {
        "schedule": {"rl_steps": 2, "opd_steps": 1, "rl_steps_of": {"video": 1, "image": 1}}}),
    "adaptive": (2, 3, False, ADAPTIVE),
    "one expert": (3, 1, False, {"schedule": {"rl_steps": 2, "opd_steps": 0},
                                 "rollout": {"prompts_per_step": 5, "group_size": 2}}),
}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A PEFT folder with random factors."""
    folder = tmp_path_factory.mktemp("frozen")
    with toy_trainer(make_config(1), folder / "run") as trainer:
        randomise(trainer)
        bank = trainer.runner.backbone.bank
        factors = {name: p.detach().clone() for name, p in bank.parameters_of("text").items()}
        save_peft_adapter(folder / "old", Adapter(factors, 2.0), TEXT_PREFIX["qwen3"], tiny_model("qwen3"))
    return folder / "old"


@pytest.mark.parametrize("case", CASES)
def test_several_ranks_equal_one(case, frozen, tmp_path):
    ranks, count, weighted, sections = CASES[case]
    if "frozen" in case:
        sections = {**sections, "exchange": {**sections["exchange"], "frozen_teachers": {"old": str(frozen)}}}
    config = make_config(count, weighted, **sections)
    want = run_ranks(1, run_steps, config, tmp_path / "one")[0]
    for got in run_ranks(ranks, run_steps, config, tmp_path / "several", timeout_s=120):
        assert got["tokens"] == want["tokens"]
        for expert, factors in want["adapters"].items():
            for name, factor in factors.items():
                torch.testing.assert_close(got["adapters"][expert][name], factor, rtol=0, atol=1e-8,
                                           msg=f"{expert} {name}")
        for step, (own, expected) in enumerate(zip(got["metrics"], want["metrics"])):
            # One replica exchanges nothing, so it has no bytes to count.
            assert {name for name in own if not name.startswith("exchange/")} == expected.keys()
            for name, value in expected.items():
                if name.startswith(("edge/", "pair/")) or name.endswith(("/tokens", "/length", "/reward")):
                    assert own[name] == pytest.approx(value, rel=1e-6, abs=1e-9), (step, name)
            idle = {name: value for name, value in own.items() if "/idle/" in name}
            assert len(idle) == 3 * count
            assert all(0 <= value <= 1 for value in idle.values())
    CHECKS.get(case, lambda result: None)(want)


def edges_of(metrics) -> set[str]:
    return {name.split("/")[1] for name in metrics if name.startswith("edge/")}


def check_expander(result) -> None:
    assert [len(edges_of(metrics)) for metrics in result["metrics"]] == [0, 10]


def check_gossip(result) -> None:
    for metrics in result["metrics"]:
        first, second = edges_of(metrics)
        assert first == "->".join(reversed(second.split("->")))


def check_own_steps(result) -> None:
    """One step each of image and video, not the same; all three in the OPD step, on the prompts that come next."""
    learned = [{e for e in ("text", "image", "video") if f"{e}/grad_norm" in metrics} for metrics in result["metrics"]]
    assert sorted(map(len, learned)) == [2, 2, 3] and len(learned[2]) == 3
    asked = [{prompt for expert, teacher, prompt, _ in step if expert == "video" and teacher is None}
             for step in result["tokens"]]
    assert sorted(set().union(*asked)) == [f"c/train/{i}" for i in range(6)]


def check_adaptive(result) -> None:
    opd = [bool(edges_of(metrics)) for metrics in result["metrics"]]
    assert len(opd) == 5 and not opd[0] and any(opd)
    later = next(metrics for metrics in result["metrics"] if edges_of(metrics))
    assert len({edge.split("->")[1] for edge in edges_of(later)}) == len(edges_of(later)) == 3


CHECKS = {"expander, weighted co-hosting": check_expander, "gossip, weighted blocks, an uneven number": check_gossip,
          "own numbers of steps": check_own_steps, "adaptive": check_adaptive}


def test_an_adaptive_run_resumes_where_it_was(tmp_path):
    config = make_config(3, **ADAPTIVE, checkpoint={"every": 3})

    def train(resume=False):
        with toy_trainer(config, tmp_path, resume) as trainer, trainer.milestones:
            assert trainer.step == (3 if resume else 0)
            for step in range(trainer.step, 5):
                phase = trainer.schedule.phase(step)
                trainer.milestones.after_step(step + 1, phase, trainer.train_step(step, phase))
            return adapters_of(trainer), trainer.schedule.state()

    want, state = train()
    assert state["step"] == 5 and 0 < state["opd_steps"] < 5 and state["overlaps"]
    got, again = train(resume=True)
    assert again == state
    assert all(torch.equal(factor, got[e][name]) for e, own in want.items() for name, factor in own.items())
