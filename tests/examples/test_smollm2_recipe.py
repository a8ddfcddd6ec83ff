"""The recipe on the real language model: built on 1 and 4 ranks; one step of each phase, every policy evaluated."""
import json
from pathlib import Path

import pytest

from copd_megatron.launch import cli
from support.smollm2 import smollm2

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "smollm2_three_skills.py"
SMALL = ["rollout.prompts_per_step=2", "rollout.group_size=2", "rollout.max_completion_tokens=6", "schedule.cycles=1",
         "schedule.rl_steps=1", "schedule.opd_steps=1", "evaluation.final_prompts=4", "metrics.progress=off",
         "metrics.tensorboard=false", "metrics.overlap_tokens=8", "evaluation.keep_best=false"]


@pytest.mark.usefixtures("no_world")
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_dry_run(ranks, capsys):
    assert cli.main(["train", str(RECIPE), "--dry-run", "--world-size", str(ranks), "--set",
                     f"model.path={smollm2()}"]) == 0
    shown = capsys.readouterr().out
    assert f"replicas{ranks}: every kind of rank was built" in shown and shown.rstrip().endswith("\nready to train")


def test_one_step_of_each_phase_with_the_full_topology(tmp_path):
    run = tmp_path / "run"
    assert cli.main(["train", str(RECIPE), "--run-dir", str(run), "--set", f"model.path={smollm2()}",
                     "exchange.topology=full", *SMALL]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["phase"] in ("rlvr", "opd")]
    assert [step["phase"] for step in steps] == ["rlvr", "opd"]
    skills = ("addition", "reversing", "comparing")
    assert sum(name.startswith("edge/") and name.endswith("/tokens") for name in steps[1]) == 6
    for step in steps:
        assert all(0 <= step[f"{skill}/reward/accuracy"] <= 1 and 0 < step[f"{skill}/length"] <= 6 for skill in skills)
    policies = json.loads((run / "summary.json").read_text())["policies"]
    assert set(policies) == {"base", "merged", *skills}
    assert (run / "merged" / "model.safetensors").exists()
