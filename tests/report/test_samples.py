"""Which samples a report shows, and how their tokens are marked."""
import numpy as np

from copd_megatron.metrics.rollout_writer import RolloutRecord, RolloutWriter
from copd_megatron.report.reader import RunData, read_run
from copd_megatron.report.samples import pick_samples, samples_html
from copd_megatron.types import Completion, Segment
from support.fake_run import decode, fake_run, make_prompt, make_rollouts


def write_one(run_dir, segments, deltas, **fields):
    completion = Completion(make_prompt("text", 0), "image", 0, segments, **fields)
    RolloutWriter(run_dir, decode).write(1, [RolloutRecord(completion, "opd", None, deltas)])
    run = RunData(run_dir, phases={1: "opd"}, rollout_files=list((run_dir / "rollouts").iterdir()))
    return samples_html(pick_samples(run))


def test_newest_step_of_each_phase_cross_batches_first(tmp_path):
    run = read_run(fake_run(tmp_path, cycles=2, rl_steps=3, opd_steps=2))
    groups = pick_samples(run)
    kinds = [(g.step, g.phase, g.expert, g.domain) for g in groups]
    assert len(kinds) == len(set(kinds)) == 10
    assert {k[:2] for k in kinds[:7]} == {(10, "opd")} and {k[:2] for k in kinds[7:]} == {(8, "rlvr")}
    assert [g.expert != g.domain for g in groups[:7]] == [True] * 4 + [False] * 3
    for group in groups:
        assert len(group.rows) == 2 and group.rows[0]["reward"] >= group.rows[1]["reward"]
        assert len({row["prompt_key"] for row in group.rows}) == 1
        assert (group.media is not None) == (group.domain != "text")


def test_shards_of_a_step_add_up(tmp_path):
    rng = np.random.default_rng(0)
    for shard, experts in enumerate((["text", "image"], ["video"])):
        writer = RolloutWriter(tmp_path, decode, shard=shard, shards=2)
        writer.write(4, make_rollouts(rng, "rlvr", experts, experts[0]))
    run = RunData(tmp_path, phases={4: "rlvr"}, rollout_files=sorted((tmp_path / "rollouts").iterdir()))
    assert {g.expert for g in pick_samples(run)} == {"text", "image", "video"}


def test_tint_follows_the_sign_and_size_of_delta(tmp_path):
    segments = [Segment([18, 19, 20, 21], "policy", [-1.0] * 4)]
    page = write_one(tmp_path, segments, {"text": [9.0, -1.5, 0.001, float("nan")]})
    for tint, delta, token in (("more)/0.75", "+9.000", " 3"), ("less)/0.38", "-1.500", " 4")):
        marks = f"style='background:rgb(var(--{tint})' title='log p -1.000, delta {delta}'"
        assert f"<span {marks}>{token}</span>" in page
    assert "<span title='log p -1.000, delta +0.001'> 7</span>" in page
    assert "<span title='log p -1.000'> 12</span>" in page
    assert "teacher text" in page


def test_environment_tokens_are_marked_and_cuts_are_said(tmp_path):
    segments = [Segment([18] * 299, "policy", [-1.0] * 299), Segment([29] * 10, "environment")]
    page = write_one(tmp_path, segments, {}, finish="length", extracted=None, reward_parts={"<x>": 1.0})
    assert "<span class='env' title='environment'> &lt;b&gt;</span>" in page
    assert "… 9 more tokens" in page
    assert "cut at the limit" in page and "read “nothing”" in page and "&lt;x&gt; 1" in page


def test_ungraded_completions_and_control_characters(tmp_path):
    page = write_one(tmp_path, [Segment([18], "policy", [-1.0])], {"text": [0.0]}, text="")
    assert "no reward" in page and "reward 0.00" not in page
    assert samples_html(()) == ""
    page = write_one(tmp_path, [Segment([18], "policy", [-1.0])], {}, extracted="a\x00\x1bb",
                     reward_parts={"x": 1.0})
    assert "a␀␛b" in page and "\x00" not in page


def test_no_rollouts_no_samples(tmp_path):
    assert samples_html(pick_samples(RunData(tmp_path))) == ""
