"""Every layout trains the very same experts: tokens equal, adapters within 1e-8 in float64, against one rank."""
import functools

import pytest
import torch

from support.ranks import run_ranks
from support.toy_run import run_steps, toy_config

VARIANTS = {
    "plain": {},
    "completion scope, first layer 1": {"adapter": {"rank": 3, "alpha": 6.0, "scope": "completion", "first_layer": 1}},
    "split groups, recompute, minibatches": {
        "optimizer": {"lr": 1e-2, "warmup_steps": 2, "microbatch_tokens": 56},
        "rlvr": {"minibatches_per_rollout": 2}, "opd": {"signal": "topk", "topk": 8},
        "adapter": {"rank": 3, "alpha": 6.0, "first_layer": 2}},
    "full topology, full vocabulary": {"exchange": {"topology": "full"}, "opd": {"signal": "full"}},
}
LAYOUTS = {"tp2": (2, 2, 1), "pp2": (2, 1, 2), "2 replicas": (2, 1, 1), "3 replicas": (3, 1, 1),
           "tp2 x pp2": (4, 2, 2), "pp2 x 2 replicas": (4, 1, 2)}
CASES = [("plain", layout) for layout in LAYOUTS] + [
    ("completion scope, first layer 1", "pp2 x 2 replicas"), ("completion scope, first layer 1", "tp2"),
    ("split groups, recompute, minibatches", "pp2"), ("split groups, recompute, minibatches", "2 replicas"),
    ("full topology, full vocabulary", "2 replicas"), ("full topology, full vocabulary", "tp2 x pp2")]


def _config(variant: str, tp: int, pp: int):
    sections = dict(VARIANTS[variant])
    recompute = {"model": {"recompute": "full"}} if "recompute" in variant and pp > 1 else {}
    return toy_config(**sections, **recompute, parallel={"tensor": tp, "pipeline": pp})


@functools.cache
def _one_rank(variant: str, folder: str):
    return run_ranks(1, run_steps, _config(variant, 1, 1), folder)[0]


@pytest.mark.parametrize("variant,layout", CASES)
def test_layout_equals_one_rank(variant, layout, tmp_path, tmp_path_factory):
    world, tp, pp = LAYOUTS[layout]
    want = _one_rank(variant, tmp_path_factory.getbasetemp() / variant.replace(" ", "_"))
    results = run_ranks(world, run_steps, _config(variant, tp, pp), tmp_path / "run", timeout_s=120)
    for got in results:
        assert got["tokens"] == want["tokens"]
        for expert, factors in want["adapters"].items():
            assert factors.keys() == got["adapters"][expert].keys()
            for name, factor in factors.items():
                torch.testing.assert_close(got["adapters"][expert][name], factor, rtol=0, atol=1e-8,
                                           msg=f"{expert} {name}")
    for got, expected in zip(results[0]["metrics"], want["metrics"]):
        # One rank per value: the metrics agree wherever they do not measure the work itself.
        for name, value in expected.items():
            if not name.startswith(("time/", "tokens/", "memory/")) and "/idle/" not in name:
                assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_training_moves_every_expert(tmp_path):
    result = run_ranks(1, run_steps, _config("plain", 1, 1), tmp_path / "run")[0]
    for expert, factors in result["adapters"].items():
        assert max(f.abs().max() for n, f in factors.items() if n.endswith("lora_B")) > 1e-3, expert
    assert all(len(step) for step in result["tokens"])
    assert any(edge for _, edge, _, _ in result["tokens"][1])
