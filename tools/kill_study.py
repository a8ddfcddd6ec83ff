"""Kills ranks of small runs with SIGKILL at random moments, resumes, and compares with a run that was not killed.

A run of two forked ranks trains two experts on a random backbone, with rewards that depend on the global random
generators, and saves after every step in the background. One rank is killed: at any moment, or while a save is being
written. The run is then resumed from its newest whole save, or started again where there is none yet. Its final
adapters must equal, bit for bit, those of a run of the same layout that nobody disturbed.

    python tools/kill_study.py --times 20 --json docs/results/kill.json

Only processes that the study forked itself are killed. Exit status 1: some run ended elsewhere.
"""
from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megatron.core.transformer.multi_token_prediction  # noqa: F401  (imported here once, so that no rank has to)
import torch

import copd_megatron.platform  # noqa: F401
from copd_megatron.checkpoint.saves import list_saves
from copd_megatron.config.run import RunConfig
from support.ranks import RankError, run_ranks
from support.tiny_models import tiny_model
from support.toy_run import adapters_of, toy_config, toy_trainer
from support.toy_tasks import LetterTask

LAYOUTS = {"replicas": {}, "tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}
"""Name -> parallel section of a run on two ranks."""
STEPS = 6
SAVE_S = 0.2
"""Kills aimed at a save fall within this time after its folder appears."""

Adapters = dict[str, dict[str, torch.Tensor]]


class NoisyTask(LetterTask):
    """Its rewards also depend on Python's global generator, which a resumed run must find where it was."""

    def verify(self, item, completion):
        parts = super().verify(item, completion)
        return parts | {"accuracy": parts["accuracy"] * random.uniform(0.5, 1.0)}


def make_config(layout: str, steps: int) -> RunConfig:
    """Two experts; one half of the steps RLVR, the other OPD, saved after each."""
    return toy_config("qwen3", ("text", "image"), task=NoisyTask, parallel=LAYOUTS[layout],
                      model={"path": str(tiny_model("qwen3", num_hidden_layers=2)), "dtype": "float32"},
                      rollout={"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 3},
                      schedule={"rl_steps": steps // 2, "opd_steps": steps // 2},
                      checkpoint={"every": 1, "keep_last": 2, "export_merged": False},
                      evaluation={"final_prompts": 1}, metrics={"overlap_tokens": 3})


def train(config: RunConfig, folder: Path, resume: bool) -> Adapters:
    """One rank of a run: all its steps, without the evaluation and report that end one. Every expert's full factors."""
    with toy_trainer(config, folder, resume) as trainer, trainer.milestones as milestones:
        for step in range(trainer.step, trainer.schedule.total_steps):
            phase = trainer.schedule.phase(step)
            milestones.after_step(step + 1, phase, trainer.train_step(step, phase))
        milestones.checkpoints.wait()
        return {e: {n: f.clone() for n, f in own.items()} for e, own in adapters_of(trainer).items()}


class Killer:
    """Kills one rank of a run; says afterwards when and what it hit."""

    def __init__(self, checkpoints: Path, rng: random.Random, at_save: bool, steps: int, duration_s: float):
        self.checkpoints, self.rng, self.at_save = checkpoints, rng, at_save
        self.rank = rng.randrange(2)
        self.delay_s = rng.uniform(0.0, SAVE_S if at_save else duration_s)
        self.save = rng.randrange(1, steps)
        self.report: dict[str, Any] | None = None

    def __call__(self, ranks: Sequence[BaseProcess]) -> None:
        start = time.monotonic()
        if self.at_save and not self._await(self.checkpoints / f"step_{self.save:06d}.tmp", ranks):
            return
        time.sleep(self.delay_s)
        if not all(rank.is_alive() for rank in ranks):
            return
        ranks[self.rank].kill()
        self.report = {"rank": self.rank, "aimed_at": "save" if self.at_save else "any moment",
                       "after_s": round(time.monotonic() - start, 3),
                       "during_a_save": any(self.checkpoints.glob("step_*[0-9].tmp"))}
        # Half of the survivors are given the time to notice and to leave by themselves.
        ranks[1 - self.rank].join(self.rng.choice((0.0, 1.0)))

    @staticmethod
    def _await(path: Path, ranks: Sequence[BaseProcess]) -> bool:
        """Until the path exists; False if a rank ended before."""
        while not path.exists():
            if not all(rank.is_alive() for rank in ranks):
                return False
            time.sleep(0.001)
        return True


def one_trial(config: RunConfig, folder: Path, want: Adapters, make_killer: Callable[[], Killer]) -> dict[str, Any]:
    """Kill a run once, let it go on, compare."""
    killer = None
    while killer is None or killer.report is None:  # a run that ended before its kill does not count
        shutil.rmtree(folder, ignore_errors=True)
        killer = make_killer()
        try:
            run_ranks(2, train, config, folder, False, disturb=killer)
        except RankError:
            if killer.report is None:
                raise
    checkpoints = folder / "checkpoints"
    left = sorted(path.name for path in checkpoints.glob("*")) if checkpoints.is_dir() else []
    whole = list_saves(checkpoints)
    if not whole:
        shutil.rmtree(folder, ignore_errors=True)
    final = run_ranks(2, train, config, folder, bool(whole))[0]
    steps_recorded = _steps(folder) == list(range(1, 2 * config.schedule.rl_steps + 1))
    return {**killer.report, "found": left, "resumed_from_step": whole[0][0] if whole else 0,
            "equal": same_bits(final, want), "every_step_recorded_once": steps_recorded}


def same_bits(one: Adapters, other: Adapters) -> bool:
    """Whether all factors are the same numbers."""
    return one.keys() == other.keys() and all(
        own.keys() == other[e].keys() and all(torch.equal(f, other[e][n]) for n, f in own.items())
        for e, own in one.items())


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def study(times: int, seed: int, layouts: Sequence[str], steps: int = STEPS,
          say: Callable[[str], None] = print) -> dict[str, Any]:
    """Kill ``times`` runs, every second one during a save, layouts in turn; the table of what happened."""
    rng, trials, truth = random.Random(seed), [], {}
    with tempfile.TemporaryDirectory(prefix="kill_study") as scratch:
        for number in range(times):
            layout = layouts[number % len(layouts)]
            config = make_config(layout, steps)
            if layout not in truth:
                start = time.monotonic()
                truth[layout] = run_ranks(2, train, config, Path(scratch) / layout, False)[0], time.monotonic() - start
            want, duration_s = truth[layout]
            folder = Path(scratch) / f"killed_{number}"
            trial = one_trial(config, folder, want, lambda: Killer(
                folder / "checkpoints", rng, number % 2 == 1, steps, duration_s))  # noqa: B023 - used within the turn
            trials.append({"layout": layout, **trial})
            shutil.rmtree(folder)
            say(f"{number + 1:3d}/{times} {layout}: rank {trial['rank']} killed after {trial['after_s']:.2f} s"
                f"{' during a save' if trial['during_a_save'] else ''}, resumed from step "
                f"{trial['resumed_from_step']}: {'equal' if trial['equal'] else 'DIFFERENT'}")
    return {"steps": steps, "ranks": 2, "seed": seed, "killed": len(trials),
            "during_a_save": sum(trial["during_a_save"] for trial in trials),
            "equal": sum(trial["equal"] and trial["every_step_recorded_once"] for trial in trials), "trials": trials}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20, help="runs to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="taken in turn")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    result = study(options.times, options.seed, options.layouts)
    print(f"{result['equal']} of {result['killed']} equal bit for bit; {result['during_a_save']} hit a save")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["equal"] == result["killed"] else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
