"""Signals travel while later microbatches are scored: they leave after their own, and nobody waits for them at once."""
import pytest

from copd_megatron.exchange.answers import IN_FLIGHT
from copd_megatron.exchange.wire import Trade, Wire
from copd_megatron.metrics.timers import Timers
from copd_megatron.trainer.build import build_trainer
from copd_megatron.trainer.step_metrics import StepMetrics
from support.ranks import run_ranks
from support.toy_run import randomise, toy_config


def events_of_scoring(config, folder):
    """What this rank did in one scoring, in order: ("scored", microbatch), ("leaves", trade), ("awaited", trade)."""
    trainer = build_trainer(config, folder)
    randomise(trainer)
    edges = trainer.schedule.edges(0)
    samples = trainer.collect(0, edges, StepMetrics(trainer.groups))
    events, trades, trade, wait = [], [], Wire.trade, Trade.wait

    def leaves(self, *given):
        trades.append(trade(self, *given))
        events.append(("leaves", len(trades) - 1))
        return trades[-1]

    def awaited(self):
        events.append(("awaited", trades.index(self)))
        return wait(self)

    Wire.trade, Trade.wait = leaves, awaited
    try:
        with trainer.runner.backbone.register_forward_hook(
                lambda *_: events.append(("scored", sum(what == "scored" for what, _ in events)))):
            trainer.scoring.score(samples, 0, edges, Timers())
    finally:
        Wire.trade, Trade.wait = trade, wait
        trainer.groups.destroy()
    return events


@pytest.mark.parametrize("signal", ["sampled", "topk"])
def test_signals_travel_while_later_microbatches_are_scored(signal, tmp_path):
    config = toy_config("qwen3", ("text", "image"), exchange={"topology": "full", "transport": "scatter"},
                        opd={"signal": signal, "topk": 4, "cross_ratio": 1.0}, schedule={"rl_steps": 0},
                        rollout={"prompts_per_step": 4, "group_size": 2, "max_completion_tokens": 4},
                        optimizer={"lr": 1e-2, "microbatch_tokens": 20}, metrics={"rollouts": False})
    for events in run_ranks(2, events_of_scoring, config, tmp_path, timeout_s=120):
        begun = events.index(("scored", 0))
        assert {what for what, _ in events[:begun]} == {"leaves", "awaited"}, "requests and sizes come first"
        during = events[begun:]
        left = {trade: place for place, (what, trade) in enumerate(during) if what == "leaves"}
        awaited = {trade: place for place, (what, trade) in enumerate(during) if what == "awaited"}
        scored = [place for place, (what, _) in enumerate(during) if what == "scored"]
        assert list(left) == list(awaited) and len(left) >= 4
        assert min(left.values()) == 1, "the first signals leave after the first microbatch"
        for place in left.values():
            # What was said last has been scored last, but for the wait that makes room for it.
            assert next(what for what, _ in reversed(during[:place]) if what != "awaited") == "scored"
        trades = list(left)
        for trade, later in zip(trades, trades[IN_FLIGHT:]):
            assert sum(left[trade] < place < awaited[trade] for place in scored) >= IN_FLIGHT
            assert awaited[trade] == left[later] - 1, "waited for when there is no room for another, no earlier"
        assert all(awaited[trade] > scored[-1] for trade in trades[-IN_FLIGHT:]), "the last ones in the end"
