"""Rollout files: what goes in comes out, whole files only, shards, resume, bounded media."""
import numpy as np
import pyarrow.parquet as pq
import pytest

from copd_megatron.metrics.rollout_writer import MEDIA_PROMPTS, SCHEMA, RolloutRecord, RolloutWriter
from copd_megatron.types import Completion, Segment
from support.fake_run import decode, make_completion, make_prompt, make_rollouts


def text_record(rng):
    return RolloutRecord(make_completion(rng, make_prompt("text", 0), "text", 0, 1.0), "rlvr")


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_a_row_has_everything(tmp_path):
    prompt = make_prompt("image", 3)
    segments = [Segment([6, 18], "policy", [-0.5, -0.25], [-0.5, -0.25]), Segment([26, 20], "environment"),
                Segment([1], "policy", [-2.0], [-2.0])]
    completion = Completion(prompt, "text", 2, segments, "length", " is 3\n 7", 0.9,
                            {"accuracy": 1.0, "format": 0.0}, "7")
    record = RolloutRecord(completion, "opd", None, {"image": [0.5, -1.0, float("nan"), float("nan"), 2.0]})
    path = RolloutWriter(tmp_path, decode).write(12, [record])
    assert path == tmp_path / "rollouts" / "step_000012.parquet"
    (row,) = rows_of(path)
    assert pq.read_schema(path).names == SCHEMA.names
    assert row.pop("media_png")[:4] == b"\x89PNG"
    delta = row.pop("deltas")[0]
    np.testing.assert_array_equal(np.array(delta, float), [0.5, -1.0, np.nan, np.nan, 2.0])
    assert row == {
        "step": 12, "phase": "opd", "expert": "text", "domain": "image", "prompt_key": "image/train/3",
        "sample": 2,
        "prompt_text": ("<|im_start|> the count squares\n[9 visual tokens] answer:<|im_end|>\n"
                        "<|im_start|><think>"),
        "completion_text": " is 3\n 7", "answer": "9", "extracted": "7", "finish": "length", "reward": 0.9,
        "reward_parts": [("accuracy", 1.0), ("format", 0.0)], "advantage": None,
        "token_ids": [6, 18, 26, 20, 1], "tokens": [" is", " 3", "\n", " 7", "<|im_end|>"],
        "loss_mask": [True, True, False, False, True],
        "logprobs": [-0.5, -0.25, 0.0, 0.0, -2.0], "teachers": ["image"], "media_kind": "image"}


def test_backbone_rows_have_no_expert_and_empty_completions_work(tmp_path):
    completion = Completion(make_prompt("text", 0), None, 0, [])
    (row,) = rows_of(RolloutWriter(tmp_path, decode).write(1, [RolloutRecord(completion, "rlvr", 0.5)]))
    assert row["expert"] is None and row["tokens"] == [] and row["deltas"] == [] and row["advantage"] == 0.5


def test_no_records_give_an_empty_file(tmp_path):
    assert rows_of(RolloutWriter(tmp_path, decode).write(1, [])) == []


def test_a_delta_of_the_wrong_length_is_refused(tmp_path):
    completion = make_completion(np.random.default_rng(0), make_prompt("text", 0), "text", 0, 1.0)
    with pytest.raises(ValueError, match="delta of teacher 'image': 1 values for"):
        RolloutWriter(tmp_path, decode).write(1, [RolloutRecord(completion, "opd", None, {"image": [0.0]})])


def test_media_is_kept_for_a_few_prompts_only(tmp_path):
    rng = np.random.default_rng(0)
    records = make_rollouts(rng, "opd", ["text", "image", "video"], "text", prompts=5, group=3)
    rows = rows_of(RolloutWriter(tmp_path, decode).write(1, records))
    kept: dict[tuple, list[str]] = {}
    for row in rows:
        if row["media_png"]:
            kept.setdefault((row["expert"], row["domain"]), []).append(row["prompt_key"])
    assert set(kept) == {("image", "image"), ("video", "video"), ("text", "image"), ("text", "video")}
    assert all(len(keys) == len(set(keys)) == MEDIA_PROMPTS for keys in kept.values())


def test_every_distinct_token_is_decoded_once(tmp_path):
    calls = []

    def counting(ids):
        calls.append(tuple(ids))
        return decode(ids)

    writer = RolloutWriter(tmp_path, counting)
    rng = np.random.default_rng(0)
    for step in (1, 2):
        writer.write(step, [text_record(rng) for _ in range(20)])
    single = [c for c in calls if len(c) == 1]
    assert len(single) == len(set(single))


def test_shards_and_resume(tmp_path):
    record = text_record(np.random.default_rng(0))
    for shard in range(2):
        writer = RolloutWriter(tmp_path, decode, shard=shard, shards=2)
        for step in (1, 2, 3):
            writer.write(step, [record])
    folder = tmp_path / "rollouts"
    (folder / "step_000001-00001-of-00002.parquet.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    RolloutWriter(tmp_path, decode, shard=1, shards=2, resume_step=1)
    assert sorted(p.name for p in folder.iterdir()) == [
        "notes.txt", "step_000001-00000-of-00002.parquet", "step_000001-00001-of-00002.parquet",
        "step_000002-00000-of-00002.parquet", "step_000003-00000-of-00002.parquet"]
    RolloutWriter(tmp_path, decode, resume_step=1)               # resumed with one replica
    assert sorted(p.name for p in folder.iterdir()) == [
        "notes.txt", "step_000001-00000-of-00002.parquet", "step_000001-00001-of-00002.parquet"]


def test_a_file_that_cannot_be_written_is_counted(tmp_path, caplog):
    (tmp_path / "rollouts").write_text("a file where the folder should be")
    failures = []
    writer = RolloutWriter(tmp_path, decode, on_failure=lambda: failures.append(1))
    record = text_record(np.random.default_rng(0))
    assert writer.write(1, [record]) is None
    assert failures == [1] and "was not written" in caplog.text


def test_off_writes_nothing(tmp_path):
    assert RolloutWriter(tmp_path, decode, enabled=False).write(1, []) is None
    assert list(tmp_path.iterdir()) == []
