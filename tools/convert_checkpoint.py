"""Converts backbones, adapters and runs.

    merge      adapters, or a run's experts -> one dense Hugging Face directory
    peft       a run's expert or merged policy, or several adapters -> one PEFT adapter
    import     a PEFT adapter -> an expert to start from (experts.NAME.init_from)
    megatron   a Hugging Face directory -> a Megatron distributed checkpoint for Megatron-LM, and back
    quantize   a backbone -> the FP8 rows that model.fp8=frozen_rowwise trains on, as vLLM's W8A8
    verify     log-probs of two sides, by transformers and by our backbone

    python tools/convert_checkpoint.py merge --run runs/mine --out merged
    python tools/convert_checkpoint.py merge --backbone qwen3-8b --adapters maths code --rule weighted \\
        --weights maths=0.7 code=0.4 --out merged --dtype bfloat16 --profile
    python tools/convert_checkpoint.py peft --run runs/mine --policy maths --out maths_adapter
    python tools/convert_checkpoint.py quantize --run runs/mine --out backbone_fp8
    python tools/convert_checkpoint.py verify merged qwen3-8b+maths_adapter --text "What is 2 + 3?"

Everything is written to a temporary name and renamed when it is whole. docs/convert.md explains rules and formats.
Exit codes: 0 done, 1 `verify` found a difference, 2 a mistake the user can mend, 130 interrupted.
"""
from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from copd_megatron.launch import environment  # noqa: E402

environment.set_defaults()  # before the libraries that read them

import torch  # noqa: E402
from pydantic import ValidationError  # noqa: E402

import copd_megatron.platform  # noqa: E402, F401  (before any of Megatron)
from copd_megatron.checkpoint import verify as verification  # noqa: E402
from copd_megatron.checkpoint.huggingface import refuse_activated, save_merged, save_quantised  # noqa: E402
from copd_megatron.checkpoint.megatron_reader import from_megatron  # noqa: E402
from copd_megatron.checkpoint.megatron_writer import to_megatron  # noqa: E402
from copd_megatron.checkpoint.peak_memory import PeakMemory  # noqa: E402
from copd_megatron.checkpoint.peft import read_peft_adapter, save_peft_adapter  # noqa: E402
from copd_megatron.checkpoint.sources import MERGED, Merge, RunSave, merge, open_run, read_adapters  # noqa: E402
from copd_megatron.checkpoint.w8a8 import rounded_weights  # noqa: E402
from copd_megatron.config.errors import explain  # noqa: E402
from copd_megatron.config.trainer import MergeConfig  # noqa: E402
from copd_megatron.launch.table import format_table  # noqa: E402
from copd_megatron.metrics.byte_progress import ByteProgress  # noqa: E402
from copd_megatron.model.safetensor_reader import check_files  # noqa: E402
from copd_megatron.model.spec import BackboneSpec  # noqa: E402
from copd_megatron.model.translate import TEXT_PREFIX, check_backbone  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
TEXT, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return options.run_command(options)
    except UserError as error:
        # Errors about a backbone name the field of a recipe; here it is an option.
        print("convert_checkpoint: " + str(error).replace("model.path:", "backbone:", 1), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; nothing was left half-written", file=sys.stderr)
        return 130


def run_merge(options: argparse.Namespace) -> int:
    """Adapters or a run's experts into a dense directory."""
    save, spec, backbone = _inputs(options)
    made = _merged(options, save, spec)
    refuse_activated(made.adapter)
    rounded = rounded_weights(backbone, spec) if options.quantize else {}
    _check_out(options)
    with _watched(options, "merge", backbone, rounded) as advance:
        save_merged(options.out, backbone, made.adapter, TEXT_PREFIX[spec.family], DTYPES.get(options.dtype),
                    made.about, advance, rounded)
    _report(options.out, made)
    return 0


def run_quantize(options: argparse.Namespace) -> int:
    """A backbone's linears in FP8 rows."""
    if not (options.run or options.backbone):
        raise UserError("--backbone: missing; what is to be quantised is a run's backbone or a Hugging Face directory; "
                        "give --run or --backbone")
    _, spec, backbone = _inputs(options)
    rounded = rounded_weights(backbone, spec)
    _check_out(options)
    with _watched(options, "quantize", backbone, rounded) as advance:
        save_quantised(options.out, backbone, rounded, DTYPES.get(options.dtype), advance)
    print(f"written: {options.out} ({len(rounded)} tensors in FP8 rows)")
    return 0


def run_peft(options: argparse.Namespace) -> int:
    """One policy as a PEFT adapter."""
    save, spec, backbone = _inputs(options)
    if save and options.policy != MERGED:
        made = merge({options.policy: save.adapter_of(options.policy, spec)}, MergeConfig(), options.rank)
    else:
        made = _merged(options, save, spec)
    _check_out(options)
    save_peft_adapter(options.out, made.adapter, TEXT_PREFIX[spec.family], backbone)
    _report(options.out, made)
    return 0


def run_import(options: argparse.Namespace) -> int:
    """A PEFT adapter as an expert's start, and what its run must be configured like."""
    spec = check_backbone(options.backbone)
    adapter = read_peft_adapter(options.adapter, spec)
    _check_out(options)
    save_peft_adapter(options.out, adapter, TEXT_PREFIX[spec.family], options.backbone)
    modules = [module.split(".") for module in adapter.modules()]
    rank = max(adapter.pair(module)[0].shape[0] for module in adapter.modules())
    scope = "sequence" if adapter.invocation_token_ids is None else "completion"
    print(f"written: {options.out}\nA run's expert NAME starts as this adapter, bit by bit, with\n"
          f"  experts.NAME.init_from={options.out.resolve()}\n  adapter.scope={scope}\n"
          f"  adapter.rank={rank}   (or more: the added ranks begin as a new expert's)\n"
          f"  adapter.alpha={adapter.scaling * rank:.12g}   (alpha / rank = {adapter.scaling:.12g}, or that times a "
          f"power of two)\n  adapter.targets={json.dumps(sorted({module[3] for module in modules}))}   (or more)\n"
          f"  adapter.first_layer={min(int(module[1]) for module in modules)}   (or lower)")
    return 0


def run_megatron(options: argparse.Namespace) -> int:
    """Hugging Face -> Megatron, or back with --checkpoint."""
    spec = check_backbone(options.backbone)
    _check_out(options)
    with _watched(options, "megatron", options.backbone) as advance:
        if options.checkpoint:
            from_megatron(options.checkpoint, options.backbone, spec, options.out, DTYPES.get(options.dtype), advance)
        else:
            to_megatron(options.backbone, spec, options.out, DTYPES.get(options.dtype), advance)
    print(f"written: {options.out}")
    if not options.checkpoint:
        print(f"Megatron-LM: --load {options.out} and the options in {options.out / 'megatron_arguments.txt'}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """A table of differences; 1 if one is above the tolerance."""
    sides = [_side(text) for text in options.sides]
    asked = verification.questions(sides[0].backbone, options.text or [TEXT], options.image, options.answer)
    rows = verification.compare(sides, asked, options.dtype, lambda text: print(text, file=sys.stderr))
    print(format_table(["side", "by", "tokens", "max |log-prob difference|", "same top-1"],
                       [[r.side, r.stack, str(r.tokens), f"{r.difference:.3g}", f"{100 * r.same_top1:.1f} %"]
                        for r in rows]))
    worst = max(row.difference for row in rows)
    fine = worst <= options.tolerance
    print(f"max difference {worst:.3g} nats: {'within' if fine else 'ABOVE'} {options.tolerance:g}")
    return 0 if fine else 1


def _inputs(options: argparse.Namespace) -> tuple[RunSave | None, BackboneSpec, Path]:
    """The run's save, if a run is given, and the backbone, checked."""
    save = open_run(options.run, options.step) if options.run else None
    backbone = options.backbone or (save.backbone if save else None)
    if backbone is None:
        raise UserError("--backbone: missing; PEFT folders do not hold the weights they adapt; give the Hugging Face "
                        "directory of their backbone")
    spec = check_backbone(backbone)
    if save:
        save.check_backbone(backbone)
    return save, spec, backbone


def _merged(options: argparse.Namespace, save: RunSave | None, spec: BackboneSpec) -> Merge:
    """One policy of what was given, by the rule that was given or the run's own."""
    if save:
        names = options.experts or list(save.experts)
        adapters = {name: save.adapter_of(name, spec) for name in names}
    else:
        adapters = read_adapters(options.adapters, spec)
    if options.rule == "svd" and options.rank is None:
        raise UserError("--rank: missing; rule svd cuts the mean of the adapters to a rank; give it")
    rule = "uniform" if options.rule == "svd" else options.rule
    given = {"rule": rule, "scale": options.scale, "weights": dict(options.weights) or None}
    try:
        base = save.merge.model_dump() if save else {}
        config = MergeConfig(**base | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise explain(error) from error
    return merge(adapters, config, options.rank)


def _side(text: str) -> verification.Side:
    """HF_DIR, HF_DIR+PEFT_DIR or RUN_DIR:POLICY."""
    path, colon, policy = text.rpartition(":")
    if colon and (Path(path) / "checkpoints").is_dir():
        save = open_run(Path(path))
        save.adapter_of(policy, check_backbone(save.backbone))
        return verification.Side(save.backbone, save.folder / "adapters" / policy)
    backbone, plus, adapter = (text, "", "") if Path(text).exists() else text.partition("+")
    return verification.Side(Path(backbone), Path(adapter) if plus else None)


def _check_out(options: argparse.Namespace) -> None:
    """Never write over something that was not meant."""
    if options.out.exists() and not options.overwrite:
        raise UserError(f"--out: {options.out} exists; a new folder, or --overwrite to replace it; choose")
    if options.out.exists() and any(options.out.resolve() == Path(given).resolve() for given in
                                    (options.backbone, *(getattr(options, "adapters", None) or ())) if given):
        raise UserError(f"--out: {options.out} is what is read; the result needs a folder of its own; name another")


@contextmanager
def _watched(options: argparse.Namespace, title: str, backbone: Path,
             rounded: Collection[str] = ()) -> Iterator[Callable[[int], None]]:
    """Progress while weights are written and, with --profile, the most memory it took."""
    files, chosen = check_files(backbone), DTYPES.get(options.dtype)
    entries = files.values()
    total = sum(math.prod(e.shape) if name in rounded else
                math.prod(e.shape) * chosen.itemsize if chosen else e.end - e.begin for name, e in files.items())
    with ByteProgress(title, total) as progress:
        if not options.profile:
            yield progress.advance
            return
        with PeakMemory() as memory:
            yield progress.advance
    largest = max(entry.file.stat().st_size for entry in entries)
    print(f"peak memory {memory.peak_bytes / 1e6:.1f} MB above the start = {memory.peak_bytes / largest:.3f} x the "
          f"largest shard ({largest / 1e6:.1f} MB); {progress.done / 1e6:.1f} MB in {memory.seconds:.1f} s, "
          f"{progress.done / 1e6 / max(memory.seconds, 1e-9):.0f} MB/s")


def _report(out: Path, made: Merge) -> None:
    print(f"written: {out} ({', '.join(f'{weight:.4g} x {name}' for name, weight in made.weights.items())})")
    if made.truncation:
        about = made.about()
        print(f"rank {about['rank']}: relative error |delta - cut| / |delta| {about['relative_error']:.4g} over all "
              f"weights, {about['worst_relative_error']:.4g} at worst ({about['worst_module']})")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets ``run_command``."""
    parser = argparse.ArgumentParser(prog="convert_checkpoint.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="subcommands", required=True)

    command = _add(commands, "merge", run_merge, "adapters or a run's experts -> one dense Hugging Face directory")
    _add_sources(command)
    _add_writing(command)
    command.add_argument("--quantize", choices=("fp8_rowwise",),
                         help="the merged linears in FP8 rows, as vLLM's W8A8 (default: as they are)")

    command = _add(commands, "quantize", run_quantize, "a backbone -> its linears in FP8 rows, as vLLM's W8A8")
    command.add_argument("--run", type=Path, metavar="RUN_DIR", help="take a run's backbone")
    command.add_argument("--backbone", type=Path, metavar="HF_DIR", help="default: the run's")
    command.set_defaults(step="newest")
    _add_writing(command)

    command = _add(commands, "peft", run_peft, "a run's policy, or several adapters -> one PEFT adapter")
    command.add_argument("--policy", default=MERGED, metavar="NAME", help="of the run: an expert, or merged (default)")
    _add_sources(command)
    _add_out(command)

    command = _add(commands, "import", run_import, "a PEFT adapter -> an expert to start from")
    command.add_argument("--backbone", type=Path, required=True, metavar="HF_DIR")
    command.add_argument("--adapter", type=Path, required=True, metavar="PEFT_DIR")
    _add_out(command)

    command = _add(commands, "megatron", run_megatron, "a Hugging Face directory <-> a Megatron distributed checkpoint")
    command.add_argument("--backbone", type=Path, required=True, metavar="HF_DIR",
                         help="what is converted; with --checkpoint what says how the result is to look")
    command.add_argument("--checkpoint", type=Path, metavar="DIR",
                         help="back: the folder Megatron-LM saves to, or one of its iterations")
    _add_writing(command)

    command = _add(commands, "verify", run_verify, "compare log-probs of sides, by transformers and by our backbone")
    command.add_argument("sides", nargs="+", metavar="SIDE", help="HF_DIR, HF_DIR+PEFT_DIR or RUN_DIR:POLICY")
    command.add_argument("--text", action="append", metavar="TEXT", help=f"a user's turn; repeatable (default: {TEXT})")
    command.add_argument("--image", action="append", type=Path, default=[], metavar="FILE",
                         help="shown beside the first text; repeatable")
    command.add_argument("--answer", default=ANSWER, metavar="TEXT", help="what is scored (default: %(default)s)")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    command.add_argument("--tolerance", type=float, default=1e-4, metavar="NATS")
    return parser


def _add(commands, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run_command=run)
    return command


def _add_sources(command: argparse.ArgumentParser) -> None:
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="RUN_DIR", help="take experts from a run's saves")
    source.add_argument("--adapters", type=Path, nargs="+", metavar="PEFT_DIR", help="take PEFT adapters")
    command.add_argument("--step", type=_step, default="newest", metavar="newest|best|N", help="which save of the run")
    command.add_argument("--experts", nargs="+", metavar="NAME", help="of the run (default: all)")
    command.add_argument("--backbone", type=Path, metavar="HF_DIR", help="default: the run's")
    command.add_argument("--rule", choices=("uniform", "weighted", "task_arithmetic", "concat", "svd"),
                         help="how several become one (default: the run's merge.rule, or uniform)")
    command.add_argument("--weights", type=_weight, nargs="+", default=[], metavar="NAME=W", help="of rule weighted")
    command.add_argument("--scale", type=float, metavar="S", help="of rule task_arithmetic")
    command.add_argument("--rank", type=_positive, metavar="R", help="cut the result to this rank by SVD")


def _add_writing(command: argparse.ArgumentParser) -> None:
    _add_out(command)
    command.add_argument("--dtype", choices=("keep", *DTYPES), default="keep", help="of all weights (default: keep)")
    command.add_argument("--profile", action="store_true", help="print the most memory it took")


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="what is written, whole or not at all")
    command.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def _step(text: str) -> str | int:
    return text if text in ("newest", "best") else int(text)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.rpartition("=")
    return name, float(value)


if __name__ == "__main__":
    sys.exit(main())
