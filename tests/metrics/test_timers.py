"""Timers: exclusive nested phases that add up to the step, token rates, announcements."""
import pytest
import torch

from copd_megatron.metrics.names import check_name
from copd_megatron.metrics.timers import RANGE, UNREAD, StreamClock, Timers


class Clock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 100.0

    def mark(self):
        return self.now

    @staticmethod
    def seconds(start, end):
        return end - start


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


def test_phases_are_announced():
    heard = []
    timers = Timers(heard.append)
    with timers("rollout"):
        with timers("vision"):
            pass
    assert heard == ["rollout", "vision", "rollout"]


def test_a_border_waits_for_nobody_and_old_marks_are_read_on_the_way():
    class Stream(Clock):
        waits = 0

        def seconds(self, start, end):
            self.waits += 1
            return end - start

    clock = Stream()
    timers = Timers(clock=clock)
    for number in range(UNREAD + 1):
        assert clock.waits == 0, number
        with timers("exchange"):
            clock.now += 1
    assert clock.waits == UNREAD // 2
    assert timers.collect() == {"time/exchange_s": UNREAD + 1, "time/other_s": 0, "time/step_s": UNREAD + 1}


def test_phases_are_ranges_of_a_profile():
    timers = Timers()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        with timers("update"), timers("optimizer"):
            torch.zeros(2).add_(1)
    ranges = {e.name: e.time_range for e in profile.events() if e.name.startswith(RANGE)}
    assert ranges.keys() == {RANGE + "update", RANGE + "optimizer"}
    inner, outer = ranges[RANGE + "optimizer"], ranges[RANGE + "update"]
    assert outer.start <= inner.start <= inner.end <= outer.end


@pytest.mark.gpu
def test_a_stream_clock_charges_kernels_to_the_phase_that_launched_them():
    timers, big = Timers(clock=StreamClock()), torch.randn(4096, 4096, device="cuda")
    with timers("score"):
        for _ in range(20):
            big @ big
    with timers("update"):
        pass
    values = timers.collect()
    assert values["time/score_s"] > 10 * values["time/update_s"]
    assert values["time/step_s"] == pytest.approx(sum(v for k, v in values.items() if k != "time/step_s"), rel=1e-3)
