"""One step of the trainer has the gradients of the papers' formulas, evaluated naively in float64."""
import functools

import pytest
import torch

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import save_peft_adapter
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.seeding import generator_for
from copd_megatron.types import Segment
from support.plain_copd import PlainCopd
from support.plain_model import PlainModel
from support.tiny_models import tiny_model
from support.toy_run import randomise, toy_config, toy_trainer

EXPERTS = ("text", "image")
MANY = {"minibatches_per_rollout": 4}
VARIANTS = {
    "the paper": {},
    "token mean, Dr.GRPO, KL k3, top-k reverse": {
        "rlvr": {"reduction": "token_mean", "advantage": "dr_grpo", "kl_coef": 0.3},
        "opd": {"signal": "topk", "topk": 5, "beta": 0.7}},
    "constant, RLOO, entropy, full forward": {
        "rlvr": {"reduction": "constant", "advantage": "rloo", "entropy_coef": 0.2},
        "opd": {"signal": "full", "divergence": "forward"}},
    "KL k1 to a folder, truncated importance, full jsd, temperature": {
        "rlvr": {"kl_coef": 0.5, "kl_estimator": "k1", "kl_reference": "FOLDER", "importance_correction": "truncated",
                 "importance_cap": 1.1},
        "opd": {"signal": "full", "divergence": "jsd", "jsd_weight": 0.3},
        "rollout": {"temperature": 0.7}},
    "KL k2, masked importance, overlong, delta guard": {
        "rlvr": {"kl_coef": 0.5, "kl_estimator": "k2", "importance_correction": "masked", "importance_cap": 1.1,
                 "overlong_buffer_tokens": 3, "overlong_penalty": 0.5},
        "opd": {"delta_guard": 0.3}},
    "GSPO, top-k jsd": {"rlvr": {**MANY, "loss": "gspo", "clip_low": 0.05, "clip_high": 0.05},
                        "opd": {"signal": "topk", "topk": 5, "divergence": "jsd"}},
    "CISPO, top-k forward": {"rlvr": {**MANY, "loss": "cispo", "clip_low": 0.1, "clip_high": 0.1},
                             "opd": {"signal": "topk", "topk": 5, "divergence": "forward"}},
    "student top-k": {"rlvr": MANY, "opd": {"signal": "student_topk", "topk": 5}},
    "two epochs, dual clip": {"rlvr": {**MANY, "epochs": 2, "dual_clip": 1.05, "clip_low": 0.1, "clip_high": 0.02}},
    "scope completion from layer 1, full reverse": {
        "adapter": {"scope": "completion", "first_layer": 1}, "opd": {"signal": "full"}},
}


@functools.cache
def plain_model() -> PlainModel:
    return PlainModel(tiny_model("qwen3"), scaling=2.0)


def make_config(sections: dict, folder) -> object:
    given = {"rollout": {}, "rlvr": {}, "adapter": {}, **sections}
    if given["rlvr"].get("kl_reference"):
        given["rlvr"] = {**given["rlvr"], "kl_reference": str(folder)}
    return toy_config("qwen3", EXPERTS, **{
        **given, "rollout": {"prompts_per_step": max(2, given["rlvr"].get("minibatches_per_rollout", 1)),
                             **given["rollout"]},
        "adapter": {"rank": 3, "alpha": 6.0, **given["adapter"]},
        "optimizer": {"lr": 0.03, "warmup_steps": 0, "microbatch_tokens": 120},
        "schedule": {"rl_steps": 0, "opd_steps": 1}, "metrics": {"rollouts": False, "overlap_tokens": 1}})


def reference_factors() -> dict[str, torch.Tensor]:
    """A frozen policy of rank 2 on two projections, for the KL penalty."""
    factors = {}
    for layer in range(4):
        for name in (f"layers.{layer}.self_attn.q_proj", f"layers.{layer}.mlp.down_proj"):
            out, inp = plain_model().weights[f"{name}.weight"].shape
            for factor, shape in (("lora_A", (2, inp)), ("lora_B", (out, 2))):
                factors[f"{name}.{factor}"] = 0.2 * torch.randn(*shape, generator=generator_for(9, name, factor),
                                                                dtype=torch.float64)
    return factors


def shift_engine_logprobs(trainer) -> None:
    """An engine that is a little off: what importance correction is for."""
    collect = trainer.collector.collect

    def collect_shifted(*args, **kwargs):
        groups = collect(*args, **kwargs)
        for group in groups:
            for completion in group:
                old = completion.segments[0]
                shifts = 0.15 * torch.randn(len(old.token_ids), generator=generator_for(3, completion.prompt.key,
                                                                                        completion.sample))
                completion.segments[0] = Segment(old.token_ids, "policy",
                                                 [p + float(s) for p, s in zip(old.logprobs, shifts)],
                                                 old.sampled_logprobs)
        return groups

    trainer.collector.collect = collect_shifted


def watch_updates(trainer) -> tuple[list, dict]:
    """Samples of the step, and per expert the (factors, gradients) of each update, filled while it runs."""
    seen, updates = [], {e: [] for e in EXPERTS}
    update = trainer.learner.update

    def remember(samples, *others):
        seen.extend(samples)
        return update(samples, *others)

    trainer.learner.update = remember
    for expert, optimizer in trainer.learner.optimizers.items():
        def step(optimizer=optimizer, own=updates[expert], step=optimizer.step):
            own.append(({n: p.detach().clone() for n, p in optimizer.parameters.items()},
                        {n: p.grad.clone() for n, p in optimizer.parameters.items()}))
            return step()

        optimizer.step = step
    return seen, updates


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_formulas(variant, tmp_path):
    config = make_config({k: v for k, v in VARIANTS[variant].items()}, tmp_path / "reference")
    reference = None
    if config.rlvr.kl_reference != "backbone":
        reference = reference_factors()
        save_peft_adapter(tmp_path / "reference", Adapter(reference, 2.0), TEXT_PREFIX["qwen3"],
                          tiny_model("qwen3"))
    with toy_trainer(config, tmp_path / "run") as trainer:
        randomise(trainer)
        start = {e: {n: p.detach().clone() for n, p in o.parameters.items()}
                 for e, o in trainer.learner.optimizers.items()}
        if config.rlvr.importance_correction != "none":
            shift_engine_logprobs(trainer)
        samples, updates = watch_updates(trainer)
        metrics = trainer.train_step(0, "opd")
    parts = config.rlvr.minibatches_per_rollout
    plain = PlainCopd(config, plain_model(), start, reference)
    default = PlainCopd(make_config({"adapter": VARIANTS[variant].get("adapter", {})}, ""), plain_model(), start, None)
    for expert in EXPERTS:
        assert len(updates[expert]) == parts * config.rlvr.epochs
        assert {s.edge.teacher for s in samples if s.expert == expert and s.edge} == set(EXPERTS) - {expert}
        for number, (factors, gradients) in enumerate(updates[expert]):
            own = [s for s in samples if s.expert == expert and s.slot * parts // s.slots == number % parts]
            assert own
            want = plain.gradient(own, samples, factors)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, want[name], rtol=0, atol=1e-9, msg=f"{expert} {number} {name}")
        if expert == EXPERTS[0] and VARIANTS[variant].keys() - {"adapter"}:  # the switches were not idle
            ordinary = default.gradient(own, samples, factors)
            assert any((want[n] - ordinary[n]).abs().max() > 1e-4 for n in want)
    check_metrics(config, metrics)


def check_metrics(config, metrics) -> None:
    for expert in EXPERTS:
        if config.rlvr.minibatches_per_rollout == 1:
            assert metrics[f"{expert}/ratio_mean"] == pytest.approx(1, abs=1e-12)
            assert metrics[f"{expert}/clip_fraction"] == 0
        else:
            assert metrics[f"{expert}/ratio_mean"] != pytest.approx(1, abs=1e-6)
            assert 0 < metrics[f"{expert}/clip_fraction"] < 1
        corrected = config.rlvr.importance_correction != "none"
        assert (f"{expert}/importance_clipped" in metrics) == corrected
        assert not corrected or 0 < metrics[f"{expert}/importance_clipped"] < 1
        assert (metrics[f"{expert}/mismatch_kl"] > 1e-3) == corrected
        assert (f"{expert}/kl_penalty" in metrics) == bool(config.rlvr.kl_coef)
        teacher = next(e for e in EXPERTS if e != expert)
        assert (metrics[f"edge/{teacher}->{expert}/dropped"] > 0) == (config.opd.delta_guard is not None)
