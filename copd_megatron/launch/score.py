"""``copd score`` and ``copd generate``: a JSONL file of rows through one policy, on as many ranks as it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.launch import environment, local
from copd_megatron.launch.commands import leave, prepare
from copd_megatron.types import UserError

if TYPE_CHECKING:
    from copd_megatron.trainer.row_loop import Answer
    from copd_megatron.trainer.row_prompts import RowPrompts
    from copd_megatron.trainer.single_policy import SinglePolicy

OF_ANSWERS = ("dtype", "template_args", "fps", "max_frames", "image_pixels", "video_pixels")
"""Options that answers depend on, whatever the command."""
OF_SAMPLING = ("n", "temperature", "top_p", "greedy", "max_tokens", "seed", "ignore_stop", "max_prompt_tokens")


def score(options: argparse.Namespace) -> int:
    """Write the log-probs of every row's completion."""
    if options.top_k < 0:
        raise UserError(f"--top-k: {options.top_k}; 0 or more; correct it")

    def make(policy: SinglePolicy, prompts: RowPrompts) -> Answer:
        from copd_megatron.trainer.row_scorer import RowScorer

        return RowScorer(policy, prompts, options.batch_tokens, options.top_k)

    return _run("score", options, ("top_k",), make)


def generate(options: argparse.Namespace) -> int:
    """Write completions of every row's prompt."""
    if not options.temperature > 0 or not 0 < options.top_p <= 1:
        raise UserError(f"--temperature, --top-p: {options.temperature} and {options.top_p}; above 0, and above 0 to "
                        "1; correct them (--greedy takes the most likely token)")
    if options.greedy and options.n > 1:
        raise UserError(f"-n: {options.n} with --greedy; more than 1 greedy completion are all the same; drop one")

    def make(policy: SinglePolicy, prompts: RowPrompts) -> Answer:
        from copd_megatron.rollout.engine import SamplingParams
        from copd_megatron.trainer.row_generator import RowGenerator

        stop = () if options.ignore_stop else policy.encoder.stop_token_ids
        params = SamplingParams(temperature=options.temperature, top_p=options.top_p, greedy=options.greedy,
                                max_tokens=options.max_tokens, stop_token_ids=stop)
        return RowGenerator(policy, prompts, params, options.n, options.seed, options.lanes, options.max_prompt_tokens)

    return _run("generate", options, OF_SAMPLING, make)


def _run(what: str, options: argparse.Namespace, names: tuple[str, ...],
         make: Callable[[SinglePolicy, RowPrompts], Answer]) -> int:
    """Check, start ranks if they are needed, and answer the rows."""
    from copd_megatron.launch import row_files
    from copd_megatron.tasks.frames import MediaRules

    source, target = Path(options.input), Path(options.output)
    if environment.is_first_rank():
        row_files.check_input(source)
        row_files.check_output(target, options.overwrite)
    try:
        rules = MediaRules(fps=options.fps, min_frames=min(4, options.max_frames), max_frames=options.max_frames,
                           image_pixels=tuple(options.image_pixels or (None, None)),
                           video_pixels=tuple(options.video_pixels or (None, None)))
    except ValueError as error:
        raise UserError(f"--fps, --max-frames, --image-pixels, --video-pixels: {error}; correct it") from error
    ranks = options.tp * options.pp * (options.replicas or 1)
    if ranks > 1 and not environment.started_as_rank():
        return local.run_ranks(ranks, options.arguments)
    prepare()
    from dataclasses import replace

    from copd_megatron.config.model import ModelConfig
    from copd_megatron.config.parallel import ParallelConfig
    from copd_megatron.trainer.row_loop import run_rows
    from copd_megatron.trainer.row_prompts import RowPrompts
    from copd_megatron.trainer.single_policy import SinglePolicy

    model = ModelConfig(path=options.model, dtype=options.dtype, prefix_sharing=options.prefix_sharing == "on")
    adapter = Path(options.adapter) if options.adapter else None
    files = None
    if environment.is_first_rank():
        arguments = {name: getattr(options, name) for name in (*OF_ANSWERS, *names)} | {
            "command": what, "model": row_files.folder_stamp(Path(options.model)),
            "adapter": row_files.folder_stamp(adapter) if adapter else None}
        files = row_files.JsonlFiles(what, source, target, arguments, options.overwrite)
    policy = SinglePolicy.load(model, adapter, ParallelConfig(tensor=options.tp, pipeline=options.pp),
                               options.template_args)
    replicas = policy.groups.layout.replicas
    if options.replicas and options.replicas != replicas:
        raise UserError(f"--replicas: {options.replicas}, but torchrun started {policy.groups.layout.world_size} "
                        "ranks; --tp x --pp x --replicas must be their number; leave --replicas out")
    # Frames are picked as the family's own processor picks them.
    rules = replace(rules, frame_rule=policy.encoder.frame_rule)
    answer = make(policy, RowPrompts(policy.encoder, source.parent, policy.invocation, rules))
    if files is not None:
        files.replicas = replicas
    done = run_rows(answer, policy.groups, files)
    if files is not None:
        _end(what, files, done)
    policy.groups.destroy()
    leave()
    return 0 if done else environment.INTERRUPTED


def _end(what: str, files: Any, done: bool) -> None:
    """Close the files and say what there is."""
    counts = f"{files.rows:,} rows" + (f", {files.errors:,} of them with errors" if files.errors else "")
    if done:
        files.finish()
        print(f"{what}: {counts}: {files.target}")
    else:
        files.close()
        print(f"{what}: stopped after {counts}; the same command goes on from there", file=sys.stderr)
