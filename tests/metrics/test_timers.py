"""Timers: exclusive nested phases that add up to the step, token rates, announcements."""
import pytest

from copd_megatron.metrics.names import check_name
from copd_megatron.metrics.timers import Timers


class Clock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_nested_phases_are_counted_once_and_add_up():
    clock = Clock()
    timers = Timers(clock=clock)
    clock.now += 1                                   # other
    with timers("rollout"):
        clock.now += 10
        with timers("vision"):
            clock.now += 3
        clock.now += 2
    with timers("rollout"):
        clock.now += 1
        assert timers.seconds("rollout") == 13
    assert timers.seconds("score") == 0
    values = timers.collect()
    assert values == {"time/rollout_s": 13, "time/vision_s": 3, "time/other_s": 1, "time/step_s": 17}
    assert sum(v for k, v in values.items() if k != "time/step_s") == values["time/step_s"]
    clock.now += 5
    assert timers.collect() == {"time/other_s": 5, "time/step_s": 5}


def test_token_rates_use_their_phase():
    clock = Clock()
    timers = Timers(clock=clock)
    with timers("rollout"):
        clock.now += 4
    timers.add_tokens("rollout", 100)
    timers.add_tokens("rollout", 300)
    timers.add_tokens("update", 50)                  # no time measured: no rate
    values = timers.collect()
    assert values["tokens/rollout_per_s"] == 100
    assert "tokens/update_per_s" not in values
    for name in values:
        check_name(name)


def test_a_phase_that_raises_is_closed():
    clock = Clock()
    timers = Timers(clock=clock)
    with pytest.raises(RuntimeError):
        with timers("update"):
            clock.now += 2
            raise RuntimeError
    assert timers.phase is None
    assert timers.collect()["time/update_s"] == 2


def test_an_open_phase_goes_on_after_collect():
    clock = Clock()
    timers = Timers(clock=clock)
    with timers("evaluation"):
        clock.now += 2
        assert timers.collect()["time/evaluation_s"] == 2
        clock.now += 3
    assert timers.collect()["time/evaluation_s"] == 3


def test_unknown_phase_is_refused():
    with pytest.raises(ValueError, match="phases are rollout"):
        with Timers()("rolout"):
            pass


def test_phases_are_announced_and_devices_waited_for():
    heard, waits = [], []
    timers = Timers(lambda: waits.append(1), heard.append)
    with timers("rollout"):
        with timers("vision"):
            pass
    assert heard == ["rollout", "vision", "rollout"]
    assert len(waits) == 4                           # both borders of both phases
