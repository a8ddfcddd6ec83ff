"""The command ``copd``: arguments in, exit code out.

Nothing heavy is imported before a command runs, so that ``copd --version`` and ``copd --help`` answer at once
and in any environment. Exit codes: 0 done, 1 `doctor` found something missing or `plan` that nothing fits, 2 a
mistake the user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence

from copd_megatron import __version__
from copd_megatron.launch import environment
from copd_megatron.launch.row_arguments import add_row_commands

OTHER_RANKS_WAIT_S = 2.0
"""Ranks above 0 report an error this much later: one that all ranks share is shown once, by rank 0, whose end
makes torchrun end the others; one that only rank 3 has is shown by rank 3."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; ``arguments`` default to the process's own. Returns the exit code."""
    options = build_parser().parse_args(arguments)
    environment.set_defaults()
    try:
        options.arguments = list(sys.argv[1:] if arguments is None else arguments)
        module, _, function = options.command.rpartition(":")
        commands = importlib.import_module(f"copd_megatron.launch.{module or 'commands'}")
        return getattr(commands, function)(options)
    except KeyboardInterrupt:
        return environment.INTERRUPTED
    except BrokenPipeError:  # the reader, e.g. `copd config | head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        line = _one_line(error)
        if line is None or options.traceback:
            raise
        _report(line)
        return 2


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None if this is no mistake of theirs."""
    # Looked up, not imported: if nobody imported the module, nobody raised its error, and it may not be
    # importable here.
    types = sys.modules.get("copd_megatron.types")
    if types is not None and isinstance(error, types.UserError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("copd_"):
        return (
            f"environment: {error.name} is not installed; it is needed here; `copd doctor` says how to get it"
        )
    return None


def _report(line: str) -> None:
    if environment.is_first_rank():
        print(f"copd: {line}", file=sys.stderr)
    else:
        time.sleep(OTHER_RANKS_WAIT_S)
        print(f"copd (rank {environment.rank()}): {line}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets ``command`` to the name of its function in `launch.commands`, or to
    "module:function" of another module beside it."""
    parser = argparse.ArgumentParser(
        prog="copd",
        description="Co-evolving policy distillation: experts on one frozen backbone teach each other.",
        epilog="More than one process: torchrun --nproc-per-node N -m copd_megatron train RECIPE ...",
    )
    parser.add_argument("--version", action="version", version=f"copd_megatron {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _add_training(commands)

    preview = _command(
        commands,
        "preview",
        "preview",
        "show prompts as the model sees them, with sampled answers and rewards",
    )
    _add_recipe(preview)
    preview.add_argument("-n", type=_positive, default=8, metavar="N", help="prompts per expert (default: 8)")

    config = _command(
        commands, "config", "show_config", "show every field with its value, default and meaning"
    )
    _add_recipe(config, optional=True)
    config.add_argument("--json", action="store_true", help="print the resolved configuration as JSON")

    evaluate = _command(
        commands, "eval", "evaluate", "evaluate a run's policies, or a recipe's backbone, on held-out prompts"
    )
    evaluate.add_argument("target", metavar="RUN_DIR|RECIPE.py", help="a run folder, or a recipe")
    _add_overrides(evaluate)
    evaluate.add_argument("--prompts", type=_positive, metavar="N", help="held-out prompts per domain")
    evaluate.add_argument(
        "--samples", type=_positive, metavar="K", help="completions per prompt (avg@K, pass@K)"
    )
    mode = evaluate.add_mutually_exclusive_group()
    mode.add_argument("--greedy", dest="greedy", action="store_true", default=None, help="greedy decoding")
    mode.add_argument(
        "--sampled", dest="greedy", action="store_false", help="sample, as evaluation.temperature says"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write the results there")

    _add_run_folders(commands)
    add_row_commands(lambda *command: _command(commands, *command), _positive, _add_recipe)
    _add_planning(commands)
    _command(
        commands, "doctor", "doctor", "show which parts are installed, what they are for and how to get them"
    )
    return parser


def _add_training(commands) -> None:
    train = _command(commands, "train", "train", "train the experts of a recipe")
    _add_recipe(train)
    train.add_argument(
        "--run-dir", metavar="DIR", help="where everything is written (default: runs/<recipe>)"
    )
    train.add_argument("--resume", action="store_true", help="go on from the last save in the run folder")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="build the run of shapes without values, say what is missing, and stop; config.json alone is enough",
    )
    train.add_argument(
        "--world-size", type=_positive, metavar="N", help="ranks of the dry run (default: 1)"
    )


def _add_run_folders(commands) -> None:
    report = _command(commands, "report", "report", "show a run's results and write its report.html")
    report.add_argument("run_dir", metavar="RUN_DIR")

    compare = _command(commands, "compare", "compare", "set the results of runs side by side")
    compare.add_argument("run_dirs", metavar="RUN_DIR", nargs="+")
    compare.add_argument("--html", metavar="FILE", help="also write a page with tables and curves there")


def _add_planning(commands) -> None:
    plan = _command(
        commands, "plan", "plan", "show memory, traffic and time of a recipe on ranks that need not exist"
    )
    _add_recipe(plan)
    plan.add_argument("--world-size", type=_positive, required=True, metavar="N", help="number of ranks")
    plan.add_argument(
        "--hardware",
        default="h100",
        metavar="NAME|FILE",
        help="h100, h200, a100, cpu, or a file that `copd calibrate` wrote (default: h100)",
    )
    plan.add_argument("--search", action="store_true", help="look for the fastest layouts that fit")
    plan.add_argument(
        "--layout", action="store_true", help="also show every rank's coordinates, experts and groups"
    )
    plan.add_argument(
        "--prompt-tokens", type=_positive, metavar="P", help="length of prompts (default: measured from the tasks)"
    )
    plan.add_argument(
        "--completion-tokens", type=_positive, metavar="R", help="length of completions (default: their limit)"
    )
    plan.add_argument("--json", metavar="FILE", help="also write everything there")

    calibrate = _command(
        commands, "calibrate", "calibrate", "measure this machine's ranks for `copd plan`, in under 3 minutes"
    )
    calibrate.add_argument(
        "--out", default="hardware.json", metavar="FILE", help="where to write (default: hardware.json)"
    )


def _command(commands, name: str, function: str, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(command=function)
    return parser


def _add_recipe(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE.py",
        nargs="?" if optional else None,
        help="a Python file with a function recipe() -> RunConfig",
    )
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="SECTION.FIELD=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change a field of the recipe; may be given several times",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} given; a number of at least 1 is needed")
    return number
