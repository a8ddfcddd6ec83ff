"""Arguments of the commands that turn rows into rows: `score`, `generate`, `filter`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

Command = Callable[[str, str, str], argparse.ArgumentParser]
"""(name, "module:function" below `launch`, summary) -> the parser of a new command."""


def add_row_commands(command: Command, positive: Callable[[str], int],
                     add_recipe: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the commands, with the types and groups of arguments that all commands share."""
    score = command("score", "score:score", "log-probs of given completions")
    _add_policy(score, positive)
    score.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="also the K most likely tokens at every position"
    )

    generate = command("generate", "score:generate", "sample completions of given prompts")
    _add_policy(generate, positive)
    generate.add_argument("-n", type=positive, default=1, metavar="N", help="completions per row (default: 1)")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus mass (default: 1)")
    generate.add_argument("--greedy", action="store_true", help="take the most likely token")
    generate.add_argument(
        "--max-tokens", type=positive, default=512, metavar="N", help="of a completion (default: 512)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling noise (default: 0)")
    generate.add_argument(
        "--ignore-stop", action="store_true", help="go on after stop tokens, always to --max-tokens"
    )
    generate.add_argument(
        "--lanes", type=positive, default=256, metavar="N", help="completions that decode together (default: 256)"
    )
    generate.add_argument(
        "--max-prompt-tokens", type=positive, default=32768, metavar="N",
        help="longer prompts are errors of their rows (default: 32768)",
    )

    chosen = command(
        "filter", "filter:filter", "write a data file without questions that are too long, never or always solved"
    )
    add_recipe(chosen)
    chosen.add_argument("--expert", required=True, metavar="NAME", help="whose data file is filtered")
    chosen.add_argument(
        "-n", type=int, default=8, metavar="N", help="completions per question; 0 filters by length alone (default: 8)"
    )
    chosen.add_argument("--adapter", metavar="PEFT_DIR", help="the policy that answers (default: the backbone)")
    chosen.add_argument("--out", required=True, metavar="FILE", help="the new file, of the same kind")
    chosen.add_argument("--overwrite", action="store_true", help="begin anew, whatever was written before")


def _add_policy(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    parser.add_argument("--model", required=True, metavar="HF_DIR", help="local Hugging Face directory")
    parser.add_argument("--adapter", metavar="PEFT_DIR", help="LoRA or activated LoRA on it")
    parser.add_argument("--input", required=True, metavar="IN.jsonl", help="rows, one object a line")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="one row for each, in the same order")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever was written before")
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel size (default: 1)")
    parser.add_argument("--pp", type=positive, default=1, metavar="N", help="pipeline-parallel size (default: 1)")
    parser.add_argument(
        "--replicas", type=positive, metavar="N",
        help="copies of the model that share the rows (default: 1, under torchrun as many as its ranks give)",
    )
    parser.add_argument(
        "--prefix-sharing", choices=("on", "off"), default="on", help="evaluate a prompt once for all its rows"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="of the model (default: float32)"
    )
    parser.add_argument(
        "--batch-tokens", type=positive, default=16384, metavar="N",
        help="tokens that pass the model together (default: 16384)",
    )
    parser.add_argument(
        "--template-args", type=_json_object, default={}, metavar="JSON",
        help='variables of the chat template, e.g. \'{"enable_thinking": false}\'',
    )
    media = parser.add_argument_group("images and videos")
    media.add_argument("--fps", type=float, default=2.0, help="frames per second taken from a video (default: 2)")
    media.add_argument("--max-frames", type=positive, default=768, metavar="N", help="of a video (default: 768)")
    for kind in ("image", "video"):
        media.add_argument(
            f"--{kind}-pixels", type=positive, nargs=2, metavar=("LEAST", "MOST"),
            help="budget as the model's processor means it (default: the processor's own)",
        )


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("a JSON object is needed")
    return value
