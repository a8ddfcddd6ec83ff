"""The peers' table: numbers by hand from logs in each system's format, and logs that do not serve."""
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "benchmarks/peers/tabulate.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tabulate", TOOL)
    module = sys.modules["tabulate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tabulate"]


@pytest.fixture
def ours(tmp_path):
    """Four steps of 900 s; the merged policy is at 50 % after two and at 70 % after four."""
    run = tmp_path / "run"
    run.mkdir()
    _lines(run / "metrics.jsonl", [
        {"step": n, "phase": "rlvr", "time/step_s": 900.0, "tokens/step": 3600.0, "memory/peak_bytes": 5 * 2**30 + n}
        for n in (1, 2, 3, 4)])
    _lines(run / "evaluations.jsonl", [
        {"step": step, "policies": {"base": {"text": {"avg": 0.1}}, **({} if merged is None else {
            "merged": {"text": {"avg": merged - 0.1}, "image": {"avg": merged + 0.1}}})}}
        for step, merged in ((0, None), (2, 0.5), (4, 0.7))])
    return run


@pytest.fixture
def verl(tmp_path):
    """An expert of one step, then MOPD of two; the second is validated."""
    folder = tmp_path / "verl"
    folder.mkdir()

    def data(**more):
        return {"timing_s/step": 1800.0, "perf/total_num_tokens": 8000, "prompt_length/mean": 300.0,
                "response_length/mean": 100.0, "perf/max_memory_allocated_gb": 40.0, **more}

    _lines(folder / "text.jsonl", [{"step": 0, "data": {"val-core/text/acc/mean@1": 0.1}}, {"step": 1, "data": data()}])
    _lines(folder / "mopd.jsonl", [{"step": 1, "data": data()}, {"step": 2, "data": data(**{
        "val-core/text/acc/mean@1": 0.5, "val-core/image/acc/mean@1": 0.7, "val-aux/text/reward/mean@1": 0.9,
        "perf/max_memory_allocated_gb": 50.0})}])
    return folder


@pytest.fixture
def nemo_rl(tmp_path):
    """TensorBoard events of an expert and MOPD, one step each."""
    from torch.utils.tensorboard import SummaryWriter

    for stage in ("text", "mopd"):
        with SummaryWriter(tmp_path / "nemo_rl" / stage / "tensorboard") as writer:
            for tag, value in {"timing/train/total_step_time": 3600.0, "performance/samples_per_sec_per_gpu": 0.5,
                               "train/mean_gen_tokens_per_sample": 200.0, "ray/node.0.gpu.0.mem_gb": 30.0,
                               "ray/node.0.gpu.1.mem_gb": 60.0, "validation/accuracy": 0.75}.items():
                writer.add_scalar(tag, value, 1)
    return tmp_path / "nemo_rl"


def _lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


STAGES = ["--stages", "text", "mopd", "--domains", "text", "image"]


def test_all_sides_by_hand(tool, ours, verl, nemo_rl, tmp_path, capsys):
    out = tmp_path / "peers.json"
    assert tool.main(["--ours", str(ours), "--verl", str(verl), "--nemo-rl", str(nemo_rl), *STAGES, "--gpus", "4",
                      "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["target"] == pytest.approx(0.6)    # verl's best is the lowest of the bests
    assert result["sides"]["ours"] == pytest.approx({
        "gpu_hours": 4.0, "gpu_hours_total": 4.0, "tokens_per_s_per_gpu": 1.0, "peak_bytes": 5 * 2**30 + 4,
        "best_accuracy": 0.7, "steps": 4})
    assert result["sides"]["verl"] == pytest.approx({
        "gpu_hours": 6.0, "gpu_hours_total": 6.0, "tokens_per_s_per_gpu": 2000 / 1800 / 4, "peak_bytes": 50 * 2**30,
        "best_accuracy": 0.6, "steps": 3})
    assert result["sides"]["NeMo-RL"] == pytest.approx({
        "gpu_hours": 8.0, "gpu_hours_total": 8.0, "tokens_per_s_per_gpu": 100.0, "peak_bytes": 60 * 2**30,
        "best_accuracy": 0.75, "steps": 2})
    printed = capsys.readouterr().out
    assert "| at 60.0% | ours | verl | NeMo-RL |" in printed
    assert "| GPU-hours to the target | 4.00 | 6.00 | 8.00 |" in printed


def test_sides_that_were_not_run_say_so(tool, ours, capsys):
    assert tool.main(["--ours", str(ours), "--target", "0.45"]) == 0
    printed = capsys.readouterr().out
    assert "| GPU-hours to the target | 4.00 | not yet measured | not yet measured |" in printed
    assert tool.main(["--ours", str(ours), "--target", "0.9"]) == 0
    assert "not reached" in capsys.readouterr().out


def test_a_line_that_is_still_being_written_is_left_out(tool, ours):
    file = ours / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "time/st')
    assert len(tool.our_steps(ours)[0]) == 4


def _without(file, name):
    file.write_text(file.read_text().replace(name, "other"))


@pytest.mark.parametrize("spoil, message", [
    (lambda ours, verl: (ours / "metrics.jsonl").unlink(), "metrics.jsonl: there is no such file"),
    (lambda ours, verl: _without(ours / "metrics.jsonl", "tokens/step"), "metrics.jsonl: no column 'tokens/step'"),
    (lambda ours, verl: _without(ours / "evaluations.jsonl", "merged"), "no evaluation of the merged policy"),
    (lambda ours, verl: (verl / "text.jsonl").unlink(), "text.jsonl: there is no such file"),
    (lambda ours, verl: _without(verl / "mopd.jsonl", "perf/total_num_tokens"), "no column 'perf/total_num_tokens'"),
    (lambda ours, verl: _without(verl / "mopd.jsonl", "core/image"), "validated other/acc/mean@1|validated .*; all of"),
    (lambda ours, verl: _without(verl / "mopd.jsonl", "val-core"), "mopd.jsonl: no held-out accuracy"),
    (lambda ours, verl: (verl / "text.jsonl").write_text("no\n{}\n"), "text.jsonl line 1: no JSON"),
    (lambda ours, verl: (verl / "text.jsonl").write_text("[1]\n"), "text.jsonl line 1: a JSON list"),
])
def test_logs_that_do_not_serve_are_one_line(tool, ours, verl, capsys, spoil, message):
    spoil(ours, verl)
    assert tool.main(["--ours", str(ours), "--verl", str(verl), *STAGES]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_tensorboard_folders_that_do_not_serve_are_one_line(tool, nemo_rl, tmp_path, capsys):
    assert tool.main(["--nemo-rl", str(tmp_path / "none"), *STAGES]) == 2
    assert "no TensorBoard events" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [([], "none was given"), (["--ours", "x", "--gpus", "0"], "at least 1"),
                                                (["--ours", "x", "--target", "2"], "--target: 2.0; above 0"),
                                                (["--ours", "x", "--json", "/"], "make the folder first"),
                                                (["--ours", "x", "--json", "no/x.json"], "make the folder first")])
def test_impossible_arguments_are_refused(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err
