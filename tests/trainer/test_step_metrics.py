"""Idle shares say how long an expert's replicas wait for the busiest; the schedule is told what was measured."""
import pytest

from copd_megatron.metrics.names import check_name
from copd_megatron.parallel.placement import Placement
from copd_megatron.trainer.step_metrics import idle_shares, measured


def test_idle_shares_by_expert_and_phase():
    placement = Placement.build(("text", "video"), 3, {"text": 2.0, "video": 1.0})
    busy = {0: {"rollout": 1.0, "score": 0.0}, 1: {"rollout": 3.0, "score": 0.0}, 2: {"rollout": 4.0, "score": 0.0}}
    shares = idle_shares(placement, busy)
    assert shares == {"text/idle/rollout": pytest.approx(0.5), "video/idle/rollout": 0.0}
    assert all(check_name(name).pattern == "{expert}/idle/{phase}" for name in shares)


def test_co_hosted_experts_wait_together():
    shares = idle_shares(Placement.build(("a", "b", "c"), 2), {0: {"update": 1.0}, 1: {"update": 4.0}})
    assert shares == {"a/idle/update": 0.75, "b/idle/update": 0.75, "c/idle/update": 0.0}


def test_measured_reads_what_is_there():
    metrics = {"pair/image~text/overlap": 0.9, "pair/image~text/symmetric_kl": 3.0, "text/tokens": 70.0,
               "text/length": 4.0, "image/tokens": 30.0}
    found = measured(metrics, ["text", "image", "video"])
    assert dict(found.overlaps) == {("text", "image"): 0.9}
    assert dict(found.tokens) == {"text": 70.0, "image": 30.0} and dict(found.lengths) == {"text": 4.0}
