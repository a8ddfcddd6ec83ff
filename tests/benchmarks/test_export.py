"""The peers' data are our rows: same split, order, instruction and answers; and verl's reward is ours."""
import importlib.util
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from copd_megatron.tasks.dataset import DatasetTask

PEERS = Path(__file__).resolve().parents[2] / "benchmarks/peers"
RECIPE = """from copd_megatron.config.run import RunConfig

def recipe():
    task = {"task": "copd_megatron.tasks.dataset:DatasetTask"}
    return RunConfig(model={"path": "-"}, evaluation={"final_prompts": 3}, experts={
        name: {**task, "task_args": {"path": "%s/" + name + ".jsonl", "instruction": "Box it.", "held_out": 0.4}}
        for name in ("sums", "looks")})
"""


def _load(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("peers")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    sums = [{"prompt": f"{n} + 1?", "answer": n + 1} for n in range(30)]
    looks = [{"prompt": f"How many <image> in {n}?", "images": ["a.png"], "answer": str(n)} for n in range(30)]
    for name, rows in (("sums", sums), ("looks", looks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.py").write_text(RECIPE % folder)
    return folder


def test_rows_are_ours(data, capsys):
    assert _load(PEERS / "export.py").main([str(data / "recipe.py"), "--out", str(data / "out")]) == 0
    for split, ours, most in (("train", "train", 30), ("test", "held_out", 3)):
        for name in ("sums", "looks"):
            task = DatasetTask(data / f"{name}.jsonl", instruction="Box it.", held_out=0.4)
            rows = pq.read_table(data / "out/verl" / f"{name}_{split}.parquet").to_pylist()
            assert len(rows) == min(most, task.size(ours))
            for index, row in enumerate(rows):
                item = task.item(ours, index)
                assert json.loads(row["reward_model"]["ground_truth"]) == item.answer
                assert row["data_source"] == name and row["prompt"][0]["content"].endswith("\nBox it.")
                if name == "looks":
                    assert row["images"] == [{"image": (data / "a.png").resolve().as_uri()}]
                    assert "<image>" in row["prompt"][0]["content"]
            assert ("images" in rows[0]) == (name == "looks") and "videos" not in rows[0]
        lines = (data / "out/nemo_rl" / f"sums_{split}.jsonl").read_text().splitlines()
        assert json.loads(lines[0])["output"] == str(DatasetTask(
            data / "sums.jsonl", instruction="Box it.", held_out=0.4).item(ours, 0).answer)
    assert not (data / "out/nemo_rl/looks_train.jsonl").exists()
    reward = _load(PEERS / "verl/reward.py")
    row = pq.read_table(data / "out/verl/sums_train.parquet").to_pylist()[0]
    truth, extra = row["reward_model"]["ground_truth"], row["extra_info"]
    assert reward.compute_score("sums", f"\\boxed{{{truth}}}", truth, extra) == {"score": 1.0, "acc": 1.0}
    assert reward.compute_score("sums", "\\boxed{-5}", truth, extra) == {"score": pytest.approx(0.1), "acc": 0.0}


def test_other_tasks_are_refused(data, capsys):
    recipe = data / "other.py"
    recipe.write_text("""from copd_megatron.config.run import RunConfig

def recipe():
    return RunConfig(model={"path": "-"}, experts={"text": {"task": "copd_megatron.tasks.text:TextTask"}})
""")
    assert _load(PEERS / "export.py").main([str(recipe), "--out", str(data / "none")]) == 2
    assert "experts.text.task: TextTask; only the rows of a DatasetTask" in capsys.readouterr().err
