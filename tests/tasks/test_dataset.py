"""Rows become questions, are split without overlap, and a bad row is one error that names its place."""
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from copd_megatron.tasks.base import Task
from copd_megatron.tasks.dataset import DatasetTask
from copd_megatron.tasks.rows import copy_rows
from copd_megatron.types import UserError


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """Parquet files are mapped through a cache; keep it out of the home folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def png(shade=0, size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count):
    return [{"prompt": f"{number}+1=", "answer": number + 1} for number in range(count)]


def all_items(task, split):
    return [task.item(split, index) for index in range(task.size(split))]


def texts(items):
    return {item.messages[0]["content"] for item in items}


def only_item(tmp_path, row, other=None, **settings):
    """The training item that a row becomes; ``other`` is the row that is held out."""
    file = write(tmp_path / "one.jsonl", [row])
    held_out = write(tmp_path / "other.jsonl", [other or {"prompt": "something else", "answer": 1}])
    return DatasetTask(file, held_out=held_out, **settings).item("train", 0)


def test_rows_become_questions(tmp_path):
    task = DatasetTask(write(tmp_path / "sums.jsonl", sums(50)), seed=3)
    assert isinstance(task, Task)
    items = all_items(task, "train") + all_items(task, "held_out")
    assert len(items) == 50 and len({item.key for item in items}) == 50
    by_text = {item.messages[0]["content"]: item for item in items}
    item = by_text["7+1="]
    assert item.messages == [{"role": "user", "content": "7+1="}] and item.media == () and item.answer == 8
    assert re.fullmatch(r"sums/(train|held_out)/8", item.key)
    assert item.extra == {"data_source": "sums", "verifier": {"name": "math"}}
    assert task.verify(item, "answer: 8") == {"accuracy": 1.0, "format": 1.0}
    assert task.verify(item, "9") == {"accuracy": 0.0, "format": 0.0}
    assert task.extract("so \\boxed{8}") == "8" and task.extract("") is None
    for index in (-1, task.size("train")):
        with pytest.raises(IndexError):
            task.item("train", index)


def test_split_is_seeded_stable_and_puts_equal_questions_together(tmp_path):
    rows = sums(100) + sums(100)
    file = write(tmp_path / "sums.jsonl", rows)
    task = DatasetTask(file, held_out=0.25)
    train, held_out = all_items(task, "train"), all_items(task, "held_out")
    assert len(train) + len(held_out) == 200 and 25 <= len(held_out) <= 75
    assert not texts(train) & texts(held_out)
    again = DatasetTask(file, held_out=0.25)
    assert [item.key for item in all_items(again, "train")] == [item.key for item in train]
    other = DatasetTask(file, held_out=0.25, seed=1)
    assert texts(all_items(other, "held_out")) != texts(held_out)
    numbers = [int(item.key.rpartition("/")[2]) for item in train]
    assert numbers != sorted(numbers)  # the order of the file is no curriculum
    more = write(tmp_path / "grown.jsonl", rows + [{"prompt": "new", "answer": 0}])
    grown = DatasetTask(more, held_out=0.25)
    assert texts(held_out) <= texts(all_items(grown, "held_out")) <= texts(held_out) | {"new"}


def test_held_out_file(tmp_path):
    train = write(tmp_path / "train.jsonl", sums(5))
    test = write(tmp_path / "test.jsonl", [{"prompt": "50+1=", "answer": "51"}])
    task = DatasetTask(train, held_out=str(test))
    assert task.size("train") == 5 and task.size("held_out") == 1
    assert task.item("held_out", 0).answer == "51"
    write(test, [{"prompt": "50+1=", "answer": "51"}, {"prompt": "3+1=", "answer": "4"}])
    with pytest.raises(UserError, match=r"task_args.held_out: 1 questions .*row 2 is row 4 there"):
        DatasetTask(train, held_out=test)


def test_images_get_their_places(tmp_path):
    for name, shade in (("a.png", 10), ("b.png", 20)):
        (tmp_path / name).write_bytes(png(shade))
    paths = ["a.png", "b.png"]
    first = only_item(tmp_path, {"prompt": "which?", "images": paths, "answer": "1"})
    text = {"type": "text", "text": "which?"}
    assert first.messages[0]["content"] == [{"type": "image"}, {"type": "image"}, text]
    tagged = only_item(tmp_path, {"prompt": "<image> or <image>?", "images": paths, "answer": "1"})
    kinds = [part.get("text", part["type"]) for part in tagged.messages[0]["content"]]
    assert kinds == ["image", " or ", "image", "?"]
    parts = [{"type": "text", "text": "see"}, {"type": "image"}, {"type": "image"}]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    messages = only_item(tmp_path, {"messages": chat, "images": paths, "answer": "1"})
    assert messages.messages == chat
    for item in (first, tagged, messages):
        assert [media.pixels.flat[0] for media in item.media] == [10, 20]
    literal = only_item(tmp_path, {"prompt": "what does <image> mean in HTML?", "answer": "1"})
    assert literal.messages[0]["content"] == "what does <image> mean in HTML?"
    single = only_item(tmp_path, {"prompt": "shade?", "images": "b.png", "answer": "1"})
    assert [media.pixels.flat[0] for media in single.media] == [20]
    alone = only_item(tmp_path, {"prompt": "<image>", "images": "b.png", "answer": "1"})
    assert alone.messages[0]["content"] == [{"type": "image"}]


def test_a_message_may_hold_its_media_in_place(tmp_path):
    """As Hugging Face, Qwen's tools and OpenAI write them, beside one that the row's field holds."""
    for name, shade in (("a.png", 10), ("b.png", 20), ("c.png", 30), ("d.png", 40)):
        (tmp_path / name).write_bytes(png(shade))
    parts = [{"type": "image", "image": "a.png", "max_pixels": 99}, {"type": "image", "url": f"file://{tmp_path}/b.png"},
             {"type": "text", "text": "?"}, {"type": "image"}, {"type": "image_url", "image_url": {"url": "d.png"}}]
    item = only_item(tmp_path, {"messages": [{"role": "user", "content": parts}], "images": ["c.png"], "answer": "1"})
    assert [media.pixels.flat[0] for media in item.media] == [10, 20, 30, 40]
    assert [media.pixel_budget for media in item.media] == [(None, 99)] + 3 * [(None, None)]
    assert [part.get("text", part["type"]) for part in item.messages[0]["content"]] == [
        "image", "image", "?", "image", "image"]


def test_images_and_videos_in_one_prompt_keep_their_order(tmp_path):
    for name, shade in (("a.png", 10), ("f0.png", 30), ("f1.png", 40)):
        (tmp_path / name).write_bytes(png(shade))
    item = only_item(tmp_path, {"prompt": "<video> then <image>", "images": ["a.png"], "answer": "1",
                                "videos": [["f0.png", "f1.png"]]})
    assert [media.kind for media in item.media] == ["video", "image"]
    assert item.media[0].pixels[:, 0, 0, 0].tolist() == [30, 40]
    assert item.media[1].pixels.flat[0] == 10


def test_options_of_the_task(tmp_path):
    row = {"question": "how much?", "gold": {"value": "9.6"}, "level": 2, "verifier": None}
    item = only_item(tmp_path, row, other={"question": "how long?", "gold": {"value": 3}}, name="scales",
                     columns={"prompt": "question", "answer": "gold.value"},
                     verifier={"name": "numeric", "tolerance": 0.5}, instruction="End with 'answer:'.")
    assert item.messages[0]["content"] == "how much?\nEnd with 'answer:'." and item.answer == "9.6"
    assert item.key == "scales/train/1"
    assert item.extra == {"data_source": "scales", "level": 2, "gold": {"value": "9.6"},
                          "verifier": {"name": "numeric", "tolerance": 0.5}}
    own = only_item(tmp_path, {"prompt": "colours?", "answer": ["red", "blue"], "verifier": "set"})
    assert own.extra["verifier"] == {"name": "set"} and own.answer == ["red", "blue"]


def test_columns_of_easyr1(tmp_path, private_cache):
    """Columns problem (with a tag), images (structs) and answer."""
    rows = [{"problem": f"<image>shade {n}?", "images": [{"bytes": png(n), "path": "p"}], "answer": str(n)}
            for n in (7, 8)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist([{**rows[0], "problem": "<image>other?"}]), tmp_path / "test.parquet")
    task = DatasetTask(tmp_path / "train.parquet", columns={"prompt": "problem"}, held_out=tmp_path / "test.parquet",
                       image_pixels=(None, 4096))
    for item in all_items(task, "train"):
        assert item.answer == str(item.media[0].pixels.flat[0]) and item.media[0].pixel_budget == (None, 4096)


def test_parquet_as_hugging_face_and_verl_write_it(tmp_path, private_cache):
    """Pictures as {bytes, path} structs, messages as structs with nulls, a nested ground truth."""
    rows = [{"prompt": [{"role": "user", "content": f"<image>shade {number}?"}],
             "images": [{"bytes": png(number), "path": None}], "data_source": "shades",
             "reward_model": {"ground_truth": str(number), "style": "rule"}, "extra_info": {"index": number}}
            for number in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shades.parquet", row_group_size=6)
    columns = {"answer": "reward_model.ground_truth"}
    task = DatasetTask(tmp_path / "shades.parquet", columns=columns, held_out=0.3)
    items = all_items(task, "train") + all_items(task, "held_out")
    assert len(items) == 20 and task.size("held_out") > 0
    for item in items:
        assert item.answer == str(item.media[0].pixels.flat[0]) == str(item.extra["extra_info"]["index"])
        assert item.extra["data_source"] == "shades"
        assert item.messages[0]["content"][0] == {"type": "image"}


GOOD = {"prompt": "1+1=", "answer": "2"}
BAD_ROWS = {
    "no answer": ({"prompt": "1+1="}, "answer", "missing"),
    "null answer": ({"prompt": "1+1=", "answer": None}, "answer", "missing"),
    "empty answer": ({"prompt": "1+1=", "answer": " "}, "answer", "is empty"),
    "answer of the wrong kind": ({**GOOD, "answer": "two", "verifier": "numeric"}, "answer", "is no number"),
    "unknown verifier": ({**GOOD, "verifier": "judge"}, "verifier", "'judge' is no verifier; allowed are"),
    "prompt and messages": ({**GOOD, "messages": [{"role": "user", "content": "x"}]}, "messages",
                            "both given"),
    "neither": ({"answer": "2"}, "prompt", "missing"),
    "empty prompt": ({"prompt": "", "answer": "2"}, "prompt", "empty"),
    "prompt of numbers": ({"prompt": 7, "answer": "2"}, "prompt", "allowed is a text"),
    "unknown role": ({"messages": [{"role": "human", "content": "x"}], "answer": "2"}, "messages",
                     "message 0 is"),
    "assistant last": ({"messages": [{"role": "assistant", "content": "x"}], "answer": "2"}, "messages",
                       "the last message is the assistant's"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}], "answer": "2"},
                     "messages", "allowed are"),
    "image in two places": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a", "url": "b"}]}],
                             "answer": "2"}, "messages", "or one of"),
    "missing image": ({**GOOD, "images": ["nothing.png"]}, "images", "no file"),
    "broken image": ({**GOOD, "images": ["broken.png"]}, "images", "does not open as image"),
    "broken video": ({**GOOD, "videos": ["broken.png"]}, "videos", "does not open as video"),
    "too many places": ({**GOOD, "prompt": "<image><image>", "images": ["good.png"]}, "images",
                        "1 given, but the text has places for 2"),
    "too many images": ({**GOOD, "prompt": "<image>", "images": ["good.png", "good.png"]}, "images",
                        "2 given, but the text has places for 1"),
    "place without video": ({**GOOD, "prompt": "<image><video>", "images": ["good.png"]}, "videos",
                            "0 given, but the text has places for 1"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(case, tmp_path):
    row, field, message = BAD_ROWS[case]
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:20])
    file = write(tmp_path / "data.jsonl", [{"prompt": f"{n}", "answer": n} for n in range(9)] + [row])
    place = re.escape(f"{file} row 10, field '{field}'")
    with pytest.raises(UserError, match=f"{place}.*{re.escape(message)}"):
        DatasetTask(file)


def test_all_bad_rows_make_one_error(tmp_path):
    file = write(tmp_path / "data.jsonl", [GOOD, {"prompt": "a", "gold": None}, {"prompt": "b"}])
    message = r"row 1, field 'answer' \(column 'gold'\): missing.*\(2 more rows are wrong"
    with pytest.raises(UserError, match=message):
        DatasetTask(file, columns={"answer": "gold"})


def test_wrong_rows_are_skipped_and_counted_where_that_is_said(tmp_path, caplog):
    rows = [GOOD, {"prompt": "a"}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "b", "answer": None}]
    file = write(tmp_path / "data.jsonl", rows)
    file.write_text(file.read_text() + "{torn\n" + json.dumps({"prompt": "3+3=", "answer": "6"}) + "\n")
    held_out = write(tmp_path / "other.jsonl", sums(1))
    task = DatasetTask(file, held_out=held_out, bad_rows="skip")
    assert {item.key for item in all_items(task, "train")} == {f"data/train/{number}" for number in (1, 3, 6)}
    assert "3 of 6 rows of" in caplog.text and "row 2, field 'answer': missing" in caplog.text
    with pytest.raises(UserError, match="row 5: no valid JSON"):
        DatasetTask(file, held_out=held_out)
    with pytest.raises(UserError, match="all 1 rows of .* are wrong, first .*row 1"):
        DatasetTask(write(tmp_path / "bad.jsonl", [{"prompt": "a"}]), held_out=held_out, bad_rows="skip")


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_rows_are_copied_as_they_are(ending, tmp_path):
    rows = [{"prompt": f"{n}", "images": [{"bytes": png(n), "path": None}], "extra": {"n": n}} for n in range(2500)]
    source, target = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=700)
    else:
        source.write_text("\n".join(json.dumps({"n": n, "é": "ü"}, ensure_ascii=False) for n in range(2500)))
    wanted = [1, 2, 1500, 2500]
    copy_rows(source, wanted, target)
    if ending == ".parquet":
        assert pq.read_table(target).equals(pq.read_table(source).take([n - 1 for n in wanted]))
    else:
        lines = source.read_text().splitlines()
        assert target.read_text().splitlines() == [lines[n - 1] for n in wanted]
    assert sorted(file.name for file in tmp_path.iterdir()) == [source.name, target.name]


def test_media_that_are_not_checked_fail_by_name_when_they_are_needed(tmp_path):
    (tmp_path / "broken.png").write_bytes(png()[:20])
    with pytest.raises(UserError, match=r"one.jsonl row 1, field 'images': .* does not open"):
        only_item(tmp_path, {**GOOD, "images": ["broken.png"]}, check_media=False)


@pytest.mark.parametrize("name, content, message", [
    ("data.csv", "a,b", "allowed are files that end in .jsonl or .parquet"),
    ("empty.jsonl", "\n\n", "it has no rows"),
    ("bad.jsonl", '{"prompt": "a", "answer": 1}\n\n{"prompt"', "bad.jsonl row 3: no valid JSON"),
    ("list.jsonl", "[1]", "list.jsonl row 1: a JSON list was given"),
    ("deep.jsonl", "[" * 100_000, "deep.jsonl row 1: no valid JSON"),
    ("bad.parquet", "PAR1 not really", "cannot be read as Parquet"),
])
def test_bad_file(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        DatasetTask(tmp_path / name)


@pytest.mark.parametrize("settings, message", [
    ({"path": "nothing.jsonl"}, "task_args.path: nothing.jsonl was given; there is no such file"),
    ({"columns": {"question": "prompt"}}, "task_args.columns: ['question'] was given"),
    ({"verifier": "judge"}, "task_args.verifier: 'judge' is no verifier"),
    ({"held_out": 0}, "task_args.held_out: 0 was given; allowed is a share"),
    ({"held_out": True}, "task_args.held_out: True was given; allowed is a share"),
    ({"held_out": 1e-9}, "leaves none in held_out"),
    ({"held_out": 0.999999}, "leaves none in train"),
    ({"held_out": "nothing.jsonl"}, "task_args.held_out: nothing.jsonl was given; there is no such file"),
    ({"bad_rows": "drop"}, "task_args.bad_rows: 'drop' was given; allowed are refuse and skip"),
    ({"max_frames": 0}, "task_args: min_frames and max_frames are 0 and 0"), ({"fps": 0}, "task_args: fps is 0"),
    ({"image_pixels": (9, 3)}, "task_args: image_pixels is (9, 3)"),
])
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        DatasetTask(**{"path": write(tmp_path / "data.jsonl", sums(5)), **settings})


def test_pixels_are_not_shared_between_items(tmp_path):
    """Two calls decode twice: a caller may change its copy."""
    (tmp_path / "a.png").write_bytes(png(9))
    row = {"prompt": "?", "images": ["a.png"], "answer": "1"}
    task = DatasetTask(write(tmp_path / "one.jsonl", [row]), held_out=write(tmp_path / "two.jsonl", sums(1)))
    one, two = task.item("train", 0), task.item("train", 0)
    np.testing.assert_array_equal(one.media[0].pixels, two.media[0].pixels)
    assert not np.shares_memory(one.media[0].pixels, two.media[0].pixels)
