"""Phases, turns and edges: the paper's cycles, adaptive phases with hysteresis, experts with steps of their own."""
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.exchange import ExchangeConfig
from copd_megatron.config.losses import OpdConfig
from copd_megatron.config.reference import resolve_object
from copd_megatron.config.trainer import ScheduleConfig
from copd_megatron.exchange.schedule import Measured, Schedule, next_phase, spread_steps
from copd_megatron.types import UserError


def build(topology="hub", experts=("text", "image"), **config):
    return Schedule.build(ScheduleConfig(**config), ExchangeConfig(topology=topology), OpdConfig(),
                          experts, resolve_object)


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


PHASES = st.sampled_from(["rlvr", "opd"])
TENTHS = st.integers(0, 10).map(lambda n: n / 10)


@st.composite
def thermostats(draw):
    """Adaptive configurations that are valid."""
    enter, leave = sorted((draw(TENTHS), draw(TENTHS)))
    lengths = {field: tuple(sorted((draw(st.integers(1, 5)), draw(st.integers(1, 5)))))
               for field in ("rl_length", "opd_length")}
    return ScheduleConfig(kind="adaptive", enter_overlap=enter, leave_overlap=leave, cycles=4, **lengths)


@settings(deadline=None)
@given(thermostats(), PHASES, st.integers(1, 9), st.none() | TENTHS)
def test_phases_keep_their_least_and_most_lengths(config, phase, length, overlap):
    least, most = config.rl_length if phase == "rlvr" else config.opd_length
    after = next_phase(config, phase, length, overlap)
    if length >= most:
        assert after != phase
    elif length < least or overlap is None:
        assert after == phase


@settings(deadline=None)
@given(thermostats(), PHASES, st.integers(1, 9), TENTHS, TENTHS)
def test_more_overlap_never_means_more_distillation(config, phase, length, one, other):
    low, high = sorted((one, other))
    distils = [next_phase(config, phase, length, overlap) == "opd" for overlap in (low, high)]
    assert distils[0] >= distils[1]


@settings(deadline=None)
@given(thermostats(), st.integers(1, 9))
def test_between_the_thresholds_nothing_changes(config, length):
    middle = (config.enter_overlap + config.leave_overlap) / 2
    if not config.enter_overlap <= middle < config.leave_overlap:
        return
    for phase, (_, most) in (("rlvr", config.rl_length), ("opd", config.opd_length)):
        assert (next_phase(config, phase, length, middle) == phase) == (length < most)


@settings(deadline=None, max_examples=40)
@given(thermostats(), st.lists(st.none() | TENTHS, min_size=20, max_size=20), st.integers(0, 19))
def test_adaptive_is_a_pure_function_of_its_state(config, overlaps, saved_at):
    experts = ("a", "b", "c")
    schedule, again = (build("adaptive(1)", experts, **config.model_dump()) for _ in range(2))
    phases = []
    for step, overlap in enumerate(overlaps):
        if step == saved_at:
            again.load_state(json.loads(json.dumps(schedule.state())))
        phases.append(schedule.phase(step))
        seen = {} if overlap is None else {("a", "b"): overlap, ("c", "b"): overlap / 2}
        for own in (schedule, again) if step >= saved_at else (schedule,):
            assert own.phase(step) == phases[-1]
            assert own.edges(step) == schedule.edges(step)
            assert bool(own.edges(step)) == (phases[-1] == "opd")
            assert [own.turn(e, step) for e in experts] == [step] * 3
        schedule.observe(step, Measured(overlaps=seen))
        if step >= saved_at:
            again.observe(step, Measured(overlaps=seen))
            assert again.state() == schedule.state()
    assert phases[0] == "rlvr"
    assert schedule.state()["opd_steps"] == phases.count("opd")


def test_an_adaptive_run_by_example():
    schedule = build(kind="adaptive", cycles=2, rl_steps=3, opd_steps=2, enter_overlap=0.8, leave_overlap=0.9,
                     rl_length=[2, 4], opd_length=[1, 3])
    phases = []
    for step, overlap in enumerate([0.7, 0.85, 0.79, 0.85, 0.9, 0.99, 0.99, 0.99, 0.99, 0.1]):
        phases.append(schedule.phase(step))
        schedule.observe(step, Measured(overlaps={("text", "image"): overlap}))
    # Too short at 0.7; 0.79 is below; 0.85 is not enough to leave, 0.9 is; after four good steps OPD anyway.
    assert "".join(phase[0] for phase in phases) == "rrroorrrro"
    assert schedule.total_steps == 10
    with pytest.raises(ValueError, match="step 3 of an adaptive schedule; only step 10 is known"):
        schedule.phase(3)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 6), min_size=1), st.data())
def test_steps_are_spread_evenly_and_level(counts, data):
    length = max(counts.values())
    tokens = {e: data.draw(st.integers(1, 100)) for e in counts}
    steps = spread_steps(counts, length, tokens)
    assert steps == spread_steps(dict(counts), length, dict(tokens))
    for expert, count in counts.items():
        own = steps[expert]
        assert len(own) == len(set(own)) == count and all(0 <= i < length for i in own) and own == sorted(own)
        gaps = [(b - a - 1) % length + 1 for a, b in zip(own, own[1:] + own[:1])]
        assert not gaps or max(gaps) - min(gaps) <= 1
    cost = Counter({i: 0 for i in range(length)})
    for expert, own in steps.items():
        cost.update({i: tokens[expert] for i in own})
    worst = sum(tokens[e] for e in counts if counts[e])
    assert not length or max(cost.values()) <= worst


def test_two_slow_experts_do_not_meet():
    steps = spread_steps({"text": 4, "image": 2, "video": 1, "audio": 1}, 4, {"text": 1, "image": 5, "video": 9,
                                                                            "audio": 8})
    assert steps["text"] == [0, 1, 2, 3]
    assert not set(steps["image"]) & set(steps["video"]) and not set(steps["video"]) & set(steps["audio"])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 4), st.integers(0, 2), st.data())
def test_experts_with_steps_of_their_own(cycles, rl_steps, video, opd_steps, data):
    if max(rl_steps, video) + opd_steps == 0:
        return
    experts = ("text", "image", "video")
    schedule = build("full", experts, cycles=cycles, rl_steps=rl_steps, opd_steps=opd_steps,
                     rl_steps_of={"video": video})
    trained = Counter({e: 0 for e in experts})
    resume_at = data.draw(st.integers(0, schedule.total_steps))
    for step in range(schedule.total_steps):
        if step == resume_at:
            state = json.loads(json.dumps(schedule.state()))
            schedule = build("full", experts, cycles=cycles, rl_steps=rl_steps, opd_steps=opd_steps,
                             rl_steps_of={"video": video})
            schedule.load_state(state)
        training = schedule.training(step)
        assert {e: schedule.turn(e, step) for e in experts} == trained
        assert schedule.phase(step) == "rlvr" or training == experts
        trained.update(training)
        schedule.observe(step, Measured(tokens={e: data.draw(st.integers(1, 9)) for e in training}))
    assert schedule.total_steps == cycles * (max(rl_steps, video) + opd_steps)
    assert trained == {"text": cycles * (rl_steps + opd_steps), "image": cycles * (rl_steps + opd_steps),
                       "video": cycles * (video + opd_steps)}
    assert schedule.state()["turns"] == trained


def test_an_adaptive_schedule_lets_nobody_miss_its_turn():
    experts = ("text", "video", "audio")
    schedule = build("full", experts, kind="adaptive", cycles=6, rl_steps=3, opd_steps=2,
                     rl_steps_of={"video": 1, "audio": 1}, rl_length=[1, 1], opd_length=[1, 1])
    trained = Counter()
    for step in range(24):
        trained.update(schedule.training(step) if schedule.phase(step) == "rlvr" else ())
        schedule.observe(step, Measured(tokens={"text": 1.0, "video": 9.0 + step % 2, "audio": 9.5}))
    assert trained == {"text": 12, "video": 4, "audio": 4}


def test_state_of_experts_that_are_gone_is_dropped():
    before = build("adaptive(1)", ("a", "b", "c"), rl_steps_of={"a": 1})
    before.observe(0, Measured({("a", "b"): 0.5, ("c", "a"): 0.2}, {"a": 3, "c": 4}, {"a": 3, "c": 4}))
    after = build("adaptive(1)", ("a", "b", "new"), rl_steps_of={"a": 1})
    after.load_state(before.state())
    state = after.state()
    assert state["overlaps"] == {"a~b": 0.5} and state["lengths"] == {"a": 3} and state["step"] == 1
    assert state["turns"].keys() == {"a", "b", "new"} == state["slots"].keys()
    assert {edge.student for edge in after.edges(3)} == {"a", "b", "new"}
