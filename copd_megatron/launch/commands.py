"""What each command of ``copd`` does.

Everything heavy is imported inside the command that needs it, and only after the configuration has been
checked, so that a typo is reported at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.launch.environment import is_first_rank
from copd_megatron.launch.table import format_table

if TYPE_CHECKING:
    from copd_megatron.config.run import RunConfig

RUNS = Path("runs")
"""Runs without --run-dir are written to runs/<recipe>."""


def train(options: argparse.Namespace) -> int:
    """Train the experts of a recipe into a run folder, or only say what that would take."""
    from copd_megatron.launch import run_folder
    from copd_megatron.types import UserError

    config = configured(options)
    if options.dry_run:
        prepare()
        from copd_megatron.launch.dry_run import dry_run

        print(dry_run(config, options.world_size or 1))
        return 0
    if options.world_size:
        raise UserError(f"--world-size: {options.world_size} without --dry-run; a real run has as many ranks as "
                        "torchrun or Slurm starts; remove it")
    run_dir = Path(options.run_dir) if options.run_dir else RUNS / Path(options.recipe).stem
    if is_first_rank():
        run_folder.check_startable(run_dir, options.resume)
    prepare()
    from copd_megatron.trainer.build import build_trainer

    trainer = build_trainer(config, run_dir, options.resume)
    if is_first_rank():
        _record_start(run_dir, options, resume_step=trainer.step if options.resume else None)
    trainer.run()
    trainer.groups.destroy()
    leave()
    return 0


def _record_start(run_dir: Path, options: argparse.Namespace, resume_step: int | None) -> None:
    """Add this start to run.json: the recipe, the overrides, on how much of what."""
    import torch

    from copd_megatron.metrics.run_info import write_run_info

    world_size = torch.distributed.get_world_size()
    if torch.cuda.is_available():
        device = f"{world_size} x {torch.cuda.get_device_name()}"
    else:
        device = f"cpu, {len(os.sched_getaffinity(0))} cores"
    write_run_info(
        run_dir,
        recipe=str(Path(options.recipe).resolve()),
        arguments=options.overrides,
        world_size=world_size,
        device=device,
        resume_step=resume_step,
    )


def preview(options: argparse.Namespace) -> int:
    """Show rendered prompts, sampled answers and their rewards."""
    config = configured(options)
    prepare()
    from copd_megatron.trainer.preview import preview as show

    show(config, options.n)
    leave()
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate a run's policies, or a recipe's backbone, and print policy x domain."""
    from copd_megatron.config.loading import apply_overrides, load_recipe
    from copd_megatron.launch import run_folder

    target = Path(options.target)
    if target.suffix == ".py":
        run_dir, config = None, load_recipe(target)
    else:
        run_dir = run_folder.existing_run(target)
        config = run_folder.config_of(run_dir)
    config = apply_overrides(config, [*options.overrides, *_evaluation_overrides(options)])
    prepare()
    from copd_megatron.metrics.accuracy import policy_table_text
    from copd_megatron.trainer.evaluate import evaluate_run

    results = evaluate_run(config, run_dir)
    if is_first_rank():
        print(policy_table_text(results))
        if options.json:
            Path(options.json).write_text(json.dumps(results, indent=2) + "\n")
    leave()
    return 0


def _evaluation_overrides(options: argparse.Namespace) -> list[str]:
    given = {"final_prompts": options.prompts, "samples": options.samples, "greedy": options.greedy}
    return [f"evaluation.{field}={json.dumps(value)}" for field, value in given.items() if value is not None]


def report(options: argparse.Namespace) -> int:
    """Print a run's newest table, write its report.html and say where it is."""
    from copd_megatron.launch import run_folder

    run_dir = run_folder.existing_run(options.run_dir)
    from copd_megatron.metrics.accuracy import policy_table_text
    from copd_megatron.report.build import build_report
    from copd_megatron.report.reader import read_run

    table = read_run(run_dir).latest_accuracies()
    if table is not None:
        print(policy_table_text(table))
    print(f"report: {build_report(run_dir)}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Print the results of several runs side by side."""
    from copd_megatron.launch import run_folder

    run_dirs = [run_folder.existing_run(folder) for folder in options.run_dirs]
    from copd_megatron.report.compare import compare_runs

    print(compare_runs(run_dirs, Path(options.html) if options.html else None))
    return 0


def show_config(options: argparse.Namespace) -> int:
    """Print every field of a recipe, or of a run with nothing set, with its value, default and docstring."""
    from copd_megatron.config import schema
    from copd_megatron.config.loading import to_json
    from copd_megatron.types import UserError

    if options.recipe is None and (options.overrides or options.json):
        raise UserError(
            "copd config: --set or --json without a recipe; they change or print a recipe's configuration; "
            "name a recipe"
        )
    config = configured(options) if options.recipe else None
    if options.json:
        print(to_json(config), end="")
        return 0
    section = None
    for row in schema.field_rows(config):
        name = row.path.rpartition(".")[0]
        if name != section:
            section = name
            print(f"\n[{section}]" if section else "")
        changed = "" if row.value == row.default else f"   (default: {_shown(row.default)})"
        print(f"{row.path} = {_shown(row.value)}{changed}")
        print(
            textwrap.fill(
                f"{row.type}. {' '.join(row.doc.split())}",
                108,
                initial_indent="    ",
                subsequent_indent="    ",
            )
        )
    return 0


def _shown(value: Any) -> str:
    from copd_megatron.config.schema import REQUIRED

    if value is REQUIRED:
        return repr(value)
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return json.dumps(value, default=repr)


def plan(options: argparse.Namespace) -> int:
    """Print memory, traffic and time of a recipe on so many ranks; 1 if it does not fit."""
    from copd_megatron.simulate.hardware import load_hardware

    config = configured(options)
    hardware = load_hardware(options.hardware)
    prepare()
    from copd_megatron.launch import plan as planning
    from copd_megatron.simulate.search import search

    planned = found = placement = None
    if options.search:
        job = planning.job_of(config, options.prompt_tokens, options.completion_tokens)
        found = search(job, options.world_size, hardware, config.exchange.transport)
        print(planning.search_text(found, hardware))
        layout, fits = None, any(candidate.fits for candidate in found)
    else:
        layout, placement = planning.layout_of(config, options.world_size)
        job = planning.job_of(config, options.prompt_tokens, options.completion_tokens)
        planned = planning.make_plan(job, layout, placement, hardware, config.exchange.transport)
        print(planning.plan_text(planned))
        fits = planned.fits
    if options.layout and layout is not None:
        print(f"\n{planning.layout_text(layout, placement)}")
    if options.json:
        content = planning.plan_json(planned, found, options.layout)
        planning.write_json(options.json, content)
    return 0 if fits else 1


def calibrate(options: argparse.Namespace) -> int:
    """Measure what the ranks of this machine do, and write it for `plan`."""
    prepare()
    from copd_megatron.launch.calibrate import measure, summary
    from copd_megatron.metrics.sinks import replace_file

    hardware = measure()
    if is_first_rank():
        replace_file(Path(options.out), hardware.to_json().encode())
        print(f"{summary(hardware)}\nwritten: {options.out}")
    leave()
    return 0


def doctor(options: argparse.Namespace) -> int:
    """Print the state of the environment; 1 if something that is needed is missing or harmful."""
    from copd_megatron.launch.doctor import diagnose

    findings = diagnose()
    print(
        format_table(
            ["part", "found", "what it is for", "how to get it"],
            [[finding.part, finding.found, finding.purpose, finding.remedy] for finding in findings],
        )
    )
    bad = [finding.part for finding in findings if not finding.fine]
    print("\nAll that is needed is here." if not bad else f"\nNot in order: {', '.join(bad)}")
    return 1 if bad else 0


def configured(options: argparse.Namespace) -> RunConfig:
    from copd_megatron.config.loading import apply_overrides, load_recipe

    return apply_overrides(load_recipe(options.recipe), options.overrides)


def prepare() -> None:
    """What must be in order before Megatron-Core is imported: logging, and no part that breaks it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("copd_megatron").setLevel(logging.INFO if is_first_rank() else logging.ERROR)
    import torch

    from copd_megatron.optional import refuse_harmful_parts

    refuse_harmful_parts(torch.cuda.is_available())
    import copd_megatron.platform  # noqa: F401  (it silences Megatron's notices)


def leave() -> None:
    """Part from the other ranks. Not after an error: they may still wait in a collective."""
    from copd_megatron.parallel.groups import shutdown_distributed

    shutdown_distributed()
