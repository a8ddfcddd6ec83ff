"""Training on a device apart from the CPU: no tensor is in the wrong place, and the host waits where it must only.

The numbers are those of a run on the CPU.
"""
from __future__ import annotations

import pytest
import torch

from copd_megatron.checkpoint.saves import save_name
from support.apart_device import apart_device
from support.ranks import run_ranks
from support.toy_run import run_steps, toy_config, toy_trainer

ONCE_PER_STEP = {
    "copd_megatron/trainer/step_metrics.py bring_deltas read": 1,
    "copd_megatron/trainer/step_metrics.py _on_host tolist": 1,
}
PLAIN_TOPK = "kernels/copd_kernels/vocab_topk/reference.py _largest_ids nonzero"
"""For every chunk of logits; Triton's top-k does not wait."""
DECODING = {  # how many lanes still run, after each token; what was sampled, after a wave and when lanes leave it
    "copd_megatron/rollout/decode_state.py record _local_scalar_dense",
    "copd_megatron/rollout/decode_state.py _flush read",
}
SMALL = {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3}
RUNS = {
    "one rank": (1, "qwen3", {"opd": {"signal": "topk", "topk": 8}}),
    "completion, stored": (1, "qwen3", {
        "adapter": {"scope": "completion", "first_layer": 1}, "opd": {"signal": "full"}, "model": {"recompute": "full"},
        "rollout": SMALL | {"prefix_store_bytes": 1 << 20, "lower_states_bytes": 1 << 20}}),
    "images": (1, "qwen3_vl", {}),
    "moe, tensor": (2, "qwen3_moe", {"parallel": {"tensor": 2, "sequence_parallel": True, "moe_expert": 2},
                                     "adapter": {"targets": ("q_proj", "o_proj")}}),
    "pipeline": (2, "qwen3", {"parallel": {"pipeline": 2}, "model": {"recompute": "selective"}}),
    "context": (2, "qwen3", {"parallel": {"context": 2}, "opd": {"signal": "student_topk", "topk": 5}}),
    "replicas": (2, "qwen3", {"exchange": {"topology": "full", "transport": "scatter"}}),
}


@pytest.mark.parametrize("run", RUNS)
def test_it_trains_as_on_the_cpu(run, tmp_path):
    world, family, sections = RUNS[run]
    config = toy_config(family, ("text", "image"), **{"rollout": SMALL, **sections})

    def apart():
        with apart_device():
            return run_steps(config, tmp_path)

    for got, want in zip(run_ranks(world, apart, timeout_s=120), run_ranks(world, run_steps, config, tmp_path)):
        assert got["tokens"] == want["tokens"]
        torch.testing.assert_close(got["adapters"], want["adapters"], rtol=0, atol=1e-11)
        for own, other in zip(got["metrics"], want["metrics"]):
            assert own["text/loss"] == pytest.approx(other["text/loss"], abs=1e-11)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_where_a_step_waits(family, tmp_path):
    """Pictures of Qwen2.5-VL need no wait either; the tower of Qwen3-VL interpolates its positions by sizes that it
    reads."""
    config = toy_config(family, ("text", "image"), rollout=SMALL, rlvr={"loss": "gspo"},
                        opd={"signal": "topk", "topk": 8})

    def second_step():
        with apart_device() as waits, toy_trainer(config, tmp_path) as trainer:
            trainer.train_step(0, "rlvr")
            waits.clear()
            trainer.train_step(1, "opd")
            return dict(waits)

    waits = run_ranks(1, second_step)[0]
    decoding = {place: waits.pop(place) for place in DECODING}
    assert waits.pop(PLAIN_TOPK) > 0 and waits == ONCE_PER_STEP
    assert max(decoding.values()) <= config.rollout.max_completion_tokens


def test_a_run_is_saved_resumed_and_exported(tmp_path):
    steps = {"cycles": 1, "rl_steps": 1}

    def run(opd_steps, resume):
        config = toy_config("qwen3", ("text", "image"), schedule={**steps, "opd_steps": opd_steps}, rollout=SMALL,
                            checkpoint={"every": 1})
        with apart_device(), toy_trainer(config, tmp_path, resume) as trainer:
            trainer.run()
            return trainer.step

    assert [run_ranks(1, run, *how)[0] for how in ((0, False), (1, True))] == [1, 2]
    for name in (f"checkpoints/{save_name(2)}/sharded", "merged", "best"):
        assert any((tmp_path / name).iterdir())
