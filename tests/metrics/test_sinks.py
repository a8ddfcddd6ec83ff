"""JSON Lines: appended at once, continued exactly, nothing lost when the disk is full; W&B if installed."""
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from copd_megatron.metrics.sinks import JsonLines, WandbSink, check_wandb, keep_lines_until, replace_file
from copd_megatron.types import UserError

ROOT = Path(__file__).parents[2]


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(path: Path, steps, resume_step=None) -> None:
    lines = JsonLines(path, resume_step)
    for step in steps:
        lines.append({"step": step})
    lines.close()


def test_each_line_is_in_the_file_before_append_returns(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl", None)
    for step in range(1, 4):
        lines.append({"step": step, "x": 0.1, "übrig": "ß"})
        assert steps_in(tmp_path / "m.jsonl") == list(range(1, step + 1))
    lines.close()
    lines.close()


def test_resume_drops_later_steps_and_a_broken_line(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, [0, 1, 2, 2, 3, 4])
    with open(path, "a") as file:
        file.write('{"step": 2, "tex')
    write_steps(path, [3, 4, 5], resume_step=2)
    assert steps_in(path) == [0, 1, 2, 2, 3, 4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_resume_from_zero_keeps_what_was_before_training(tmp_path):
    path = tmp_path / "m.jsonl"
    write_steps(path, [0, 1, 2])
    write_steps(path, [1], resume_step=0)
    assert steps_in(path) == [0, 1]


def test_resume_without_a_file_starts_one(tmp_path):
    keep_lines_until(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()
    write_steps(tmp_path / "m.jsonl", [4], resume_step=3)
    assert steps_in(tmp_path / "m.jsonl") == [4]


def test_a_new_run_does_not_write_over_an_old_one(tmp_path):
    write_steps(tmp_path / "m.jsonl", [1])
    with pytest.raises(UserError, match="run_dir: .* already holds m.jsonl; .*--resume"):
        JsonLines(tmp_path / "m.jsonl", None)
    assert steps_in(tmp_path / "m.jsonl") == [1]


def test_values_that_are_no_json_are_refused(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl", None)
    with pytest.raises(ValueError):
        lines.append({"step": 1, "x": float("nan")})
    lines.close()
    assert (tmp_path / "m.jsonl").read_text() == ""


FULL_DISK = """
    import json, logging, resource, sys
    from pathlib import Path
    from copd_megatron.metrics.sinks import JsonLines
    from copd_megatron.types import UserError
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    path = Path(sys.argv[1])
    limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    lines = JsonLines(path, None, held_lines=5)
    limit(100)                                # a line and a half: the second one breaks in the middle
    lines.append({"step": 1, "text": "x" * 40})
    lines.append({"step": 2, "text": "y" * 40})
    lines.append({"step": 3, "text": "z" * 40})
    print("whole lines only:", [json.loads(l)["step"] for l in path.read_text().splitlines()])
    if sys.argv[2] == "recovers":
        limit(resource.RLIM_INFINITY)
        lines.append({"step": 4})
        lines.close()
        print("after room:", [json.loads(l)["step"] for l in path.read_text().splitlines()])
    elif sys.argv[2] == "ends":
        try:
            lines.close()
        except UserError as error:
            print("close:", error)
    else:
        try:
            for step in range(4, 20):
                lines.append({"step": step})
        except UserError as error:
            print("stopped at", step, error)
"""


def run_full_disk(path: Path, case: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path), case], cwd=ROOT,
                          capture_output=True, text=True, timeout=60, check=True)


def test_full_disk_holds_lines_and_writes_them_later(tmp_path):
    done = run_full_disk(tmp_path / "m.jsonl", "recovers")
    assert done.stdout.splitlines() == ["whole lines only: [1]", "after room: [1, 2, 3, 4]"]
    assert done.stderr.count("cannot be written") == 1
    assert "nothing was lost" in done.stderr


def test_full_disk_to_the_end_is_an_error(tmp_path):
    done = run_full_disk(tmp_path / "m.jsonl", "ends")
    assert "close: run_dir: the last 2 lines of" in done.stdout


def test_full_disk_stops_the_run_after_a_while(tmp_path):
    done = run_full_disk(tmp_path / "m.jsonl", "stops")
    assert "stopped at 7 run_dir:" in done.stdout


def test_replace_file_leaves_no_partial_file(tmp_path):
    replace_file(tmp_path / "a", b"old")
    replace_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("leftover", [False, True])
def test_missing_wandb_is_a_clear_error(leftover, tmp_path, monkeypatch):
    try:
        import wandb  # noqa: F401
        pytest.skip("wandb is installed")
    except ImportError:
        pass
    if leftover:  # W&B leaves a folder of its name where it ran, which Python takes for a package
        (tmp_path / "wandb").mkdir()
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r'metrics.wandb: .*pip install "copd_megatron\[wandb\]"'):
        check_wandb("offline")
    check_wandb("off")


def test_wandb_offline_keeps_its_run_id(tmp_path, monkeypatch):
    pytest.importorskip("wandb.sdk", reason="the extra [wandb] is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first in (1, 3):
        sink = WandbSink(tmp_path, "copd-test", "offline", {"seed": 1})
        for step in (first, first + 1):
            sink.write(step, "rlvr", {"text/reward": 0.5})
        sink.close()
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))) == 2
