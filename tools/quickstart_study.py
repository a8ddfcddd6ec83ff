"""The quickstart over several seeds, with its controls: the tables of the README, from one command.

    python tools/quickstart_study.py --out runs/study --json docs/results/quickstart.json

Runs, one after another: seeds 0, 1, 2; the same steps with distillation off; shuffled rewards; and an evaluation of
the first seed's policies on blank pictures. Runs that are finished already are not run again.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from copd_megatron.trainer.evaluator import paired_bootstrap  # noqa: E402

DOMAINS = ("text", "image", "video")
SHUFFLED = [f"experts.{d}.rewards.accuracy.function=quickstart_controls:shuffled_accuracy" for d in DOMAINS]
BLANK = ["experts.image.task=quickstart_controls:blank_image", "experts.video.task=quickstart_controls:blank_video"]


def copd(*arguments: str) -> None:
    """Run one copd command of this checkout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "examples")])}
    subprocess.run([sys.executable, "-m", "copd_megatron", *arguments], check=True, env=env, cwd=ROOT)


def train(recipe: str, folder: Path, *overrides: str) -> Path:
    """Train a recipe of ``examples/`` into ``folder`` unless it is finished there."""
    if not (folder / "summary.json").exists():
        options = [part for o in overrides for part in ("--set", o)]
        resume = ["--resume"] if (folder / "checkpoints").is_dir() else []
        copd("train", f"examples/{recipe}", "--run-dir", str(folder), *options, *resume)
    return folder


def gains(folder: Path) -> dict[str, dict[str, tuple[float, float, float]]]:
    """policy -> domain -> gain over the backbone in points, with its paired bootstrap 95 % interval."""
    held_out = json.loads((folder / "held_out.json").read_text())
    return {p: {d: tuple(100 * x for x in paired_bootstrap(by[d], held_out["base"][d])) for d in by}
            for p, by in held_out.items() if p != "base"}


def gap_around_opd(folder: Path, hub: str) -> dict[str, dict[str, float]]:
    """How far experts are apart at the last RLVR step before and at the last OPD step of each cycle.

    Means over cycles, for pairs that teach each other and for pairs that do not: top-10 overlap, symmetric KL in nats.
    """
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ends = {"before_opd": [a for a, b in zip(rows, rows[1:]) if a["phase"] == "rlvr" and b["phase"] == "opd"],
            "after_opd": [a for a, b in zip(rows, [*rows[1:], {"phase": "rlvr"}])
                          if a["phase"] == "opd" and b["phase"] == "rlvr"]}
    result = {}
    for what in ("overlap", "symmetric_kl"):
        keys = [key for key in rows[-1] if key.startswith("pair/") and key.endswith("/" + what)]
        with_hub = [key for key in keys if hub in re.split("[/~]", key)]
        for kind, chosen in (("hub", with_hub), ("spokes", [key for key in keys if key not in with_hub])):
            result[f"{kind}/{what}"] = {when: float(np.mean([row[k] for row in at for k in chosen]))
                                        for when, at in ends.items() if at}
    return result


def table(rows: Mapping[str, Mapping[str, Sequence[float]]], domains: Sequence[str]) -> str:
    """Markdown: one line per policy, gains as "+12.3 [10.1, 14.5]"."""
    lines = ["| gain in points | " + " | ".join(domains) + " |", "|---|" + "---|" * len(domains)]
    for name, by_domain in rows.items():
        cells = [f"{g:+.1f} [{low:+.1f}, {high:+.1f}]" for g, low, high in (by_domain[d] for d in domains)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def options_of(description: str, out: str) -> argparse.Namespace:
    """The command line of a study; each run gets its share of the cores."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // options.jobs))
    return options


def run_all(recipe: str, plan: Mapping[str, Sequence], jobs: int) -> dict[str, Path]:
    """Train every (folder, overrides...) of a plan; name -> folder."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(plan, pool.map(lambda arguments: train(recipe, *arguments), plan.values())))


def results(runs: Mapping[str, Path], domains: Sequence[str], hub: str) -> dict:
    """Print and return what the runs found."""
    found = {"machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}", "runs": {}}
    for name, folder in runs.items():
        summary = json.loads((folder / "summary.json").read_text())
        found["runs"][name] = {"summary": summary, "gains": gains(folder), "gap": gap_around_opd(folder, hub)}
        base = ", ".join(f"{d} {100 * summary['policies']['base'][d]:.1f} %" for d in domains)
        print(f"\n{name}: base {base}; {summary['train_s']:.0f} s; gap {found['runs'][name]['gap']}")
        print(table(found["runs"][name]["gains"], domains))
    return found


def write(file: Path | None, found: Mapping) -> None:
    """The numbers as JSON, if a file is named."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run, measure, print, write."""
    options = options_of(__doc__.splitlines()[0], "runs/study")
    out = options.out.resolve()
    plan = {f"seed {s}": (out / f"seed{s}", f"seed={s}") for s in options.seeds}
    plan["OPD off"] = (out / "opd_off", "exchange.topology=none")
    plan["rewards shuffled"] = (out / "shuffled", *SHUFFLED)
    runs = run_all("quickstart.py", plan, options.jobs)
    blank = out / "blank.json"
    if not blank.exists():
        first = out / f"seed{options.seeds[0]}"
        copd("eval", str(first), *(p for o in BLANK for p in ("--set", o)), "--json", str(blank))
    result = results(runs, DOMAINS, "text")
    result["blank"] = {p: {d: row["avg"] for d, row in by.items()}
                       for p, by in json.loads(blank.read_text())["policies"].items()}
    print("\nblank pictures (accuracy):", json.dumps(result["blank"]))
    write(options.json, result)


if __name__ == "__main__":
    main()
