"""Steps fall into the phases of the paper's cycles; a schedule with a wrong step is refused at the start."""
import pytest

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.reference import resolve_object
from copd_megatron.config.trainer import ScheduleConfig
from copd_megatron.exchange.schedule import Schedule
from copd_megatron.types import UserError


def build(topology="hub", **config):
    return Schedule.build(ScheduleConfig(**config), ExchangeConfig(topology=topology), OpdConfig(),
                          ["text", "image"], resolve_object)


def test_cycles_of_three_and_two():
    schedule = build(cycles=2, rl_steps=3, opd_steps=2)
    assert schedule.total_steps == 10
    phases = [schedule.phase(step) for step in range(10)]
    assert phases == (["rlvr"] * 3 + ["opd"] * 2) * 2
    for step, phase in enumerate(phases):
        assert len(schedule.edges(step)) == (2 if phase == "opd" else 0)


@pytest.mark.parametrize(("steps", "phases"), [((2, 0), ["rlvr"] * 4), ((0, 1), ["opd"] * 2)])
def test_one_phase_alone(steps, phases):
    schedule = build(cycles=2, rl_steps=steps[0], opd_steps=steps[1])
    assert [schedule.phase(step) for step in range(schedule.total_steps)] == phases


def test_callables_count_opd_steps_over_all_cycles():
    seen = []

    def topology(experts, opd_step):
        seen.append(opd_step)
        return [["text", "image"]]

    schedule = build(topology, cycles=3, rl_steps=1, opd_steps=2)
    assert seen == list(range(6))  # all of them are checked at the start
    seen.clear()
    for step in range(schedule.total_steps):
        schedule.edges(step)
    assert seen == list(range(6))


def test_wrong_schedules_are_refused_before_training():
    with pytest.raises(UserError, match="rl_steps and schedule.opd_steps: both are 0"):
        build(rl_steps=0, opd_steps=0)
    with pytest.raises(UserError, match="teacher 'audio'"):  # only in the last OPD step
        build(lambda experts, opd_step: [["audio" if opd_step == 3 else "text", "image"]], cycles=2)
    with pytest.raises(UserError, match="exchange.topology: 'star'"):
        build("star", opd_steps=0)
