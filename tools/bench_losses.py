"""Times the losses over the vocabulary, forward and backward, chunked against logits that are kept; and their memory.

Random hidden states of a student and a teacher and one frozen head; the loss is a weighted sum over the tokens:

* `jsd`, `reverse`, `forward`: the divergence over the whole vocabulary;
* `topk`: the reverse divergence on the teacher's top 64 and the rest's mass, the teacher's scoring included;
* `logprob`: log-prob of the sampled token, differentiated, and the entropy, which is only recorded.

`materialised` is plain torch: matmul, log_softmax and the definition, differentiated by autograd. Where Liger-Kernel
(Hsu et al. 2024, arXiv:2410.10989) is installed and there is a GPU, its fused linear JSD runs as well. Every side
runs in a process of its own, one after the other; values and gradients are compared across them. The ideal is the
matrix products alone (logits of each side, gradient of the student's hidden states) at the rate that the machine
reaches, measured as `copd calibrate` does unless `--hardware` names it.

    python tools/bench_losses.py --json losses.json
    python tools/bench_losses.py --tokens 8192 --hidden 4096 --vocab 128256 --dtype bfloat16 --json losses.json

Memory is the peak beyond hidden states and head: resident pages on a CPU (Linux), the allocator's count on a GPU.
"""
from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tools")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_backbone import add_hardware_option, peaks  # noqa: E402
from bench_record import (  # noqa: E402
    add_json_option,
    end,
    free_bytes,
    machine,
    peak_of,
    refuse_below,
    save_json,
)
from own_process import in_a_process  # noqa: E402
from torch import Tensor  # noqa: E402

import copd_megatron.platform  # noqa: E402,F401  (before any of Megatron)
from copd_kernels.backend import resolve  # noqa: E402
from copd_megatron.losses.topk_kl import log_tail, topk_divergence  # noqa: E402
from copd_megatron.model.backbone import DTYPES  # noqa: E402
from copd_megatron.model.full_divergence import full_divergence  # noqa: E402
from copd_megatron.model.vocab_parallel import Head, score  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

LOSSES = ("jsd", "topk", "reverse", "forward", "logprob")
PRODUCTS = {loss: 2 if loss == "logprob" else 3 for loss in LOSSES}
"""Matrix products of tokens x hidden x vocabulary that a loss takes at least."""
TOPK = 64
TOLERANCE = {"float32": 1e-3, "float64": 1e-9, "bfloat16": 5e-2}
"""Largest difference of values and gradients, relative to the largest; kept logits are bfloat16 if the head is."""
MATERIALISED_TENSORS = 6
"""[tokens, vocabulary] tensors that the materialised side holds at once, at most: what must fit in free memory."""


@dataclass(frozen=True)
class Case:
    """What all sides compute from."""

    student_TH: Tensor
    teacher_TH: Tensor
    head_VH: Tensor
    ids_T: Tensor
    weight_T: Tensor

    @classmethod
    def random(cls, options: argparse.Namespace, device: torch.device) -> Case:
        """The same for every side; logits of order one, sides that differ as two experts do."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        student = normal(options.tokens, options.hidden)
        teacher = student + 0.3 * normal(options.tokens, options.hidden)
        head = normal(options.vocab, options.hidden).mul_(options.hidden ** -0.5)
        ids = torch.randint(options.vocab, (options.tokens,), generator=generator)
        weight = torch.rand(options.tokens, generator=generator) / options.tokens
        dtype = DTYPES[options.dtype]
        return cls(student.to(device, dtype).requires_grad_(), teacher.to(device, dtype), head.to(device, dtype),
                   ids.to(device), weight.to(device))


@dataclass(frozen=True)
class Outcome:
    """What one side computed and what it took."""

    value: float
    gradient_TH: np.ndarray
    """float32; not a tensor, whose memory would have to outlive the process that made it."""
    seconds: float
    peak_bytes: int


def chunked(case: Case, loss: str, head: Head) -> Tensor:
    """[T] values by the trainer's functions."""
    if loss == "logprob":
        scores = score(case.student_TH, head, case.ids_T, entropy=True)
        return scores.logprobs_T + scores.entropy_T  # which has no gradient
    if loss != "topk":
        return full_divergence(case.student_TH, case.teacher_TH, head, loss).value_T
    with torch.no_grad():
        teacher = score(case.teacher_TH, head, case.ids_T, topk=TOPK)
    student = score(case.student_TH, head, case.ids_T, at_ids_TK=teacher.topk_ids_TK)
    return topk_divergence(student.at_logprobs_TK, teacher.topk_logprobs_TK, log_tail(teacher.topk_logprobs_TK),
                           kernels=head.kernels)


def materialised(case: Case, loss: str, _: Head) -> Tensor:
    """[T] values by their definitions, on logits of all tokens."""
    log_p_TV = (case.student_TH @ case.head_VH.T).float().log_softmax(1)
    if loss == "logprob":
        entropy_T = -(log_p_TV.detach().exp() * log_p_TV.detach()).sum(1)
        return log_p_TV.gather(1, case.ids_T[:, None])[:, 0] + entropy_T
    with torch.no_grad():
        log_q_TV = (case.teacher_TH @ case.head_VH.T).float().log_softmax(1)
    if loss == "topk":
        log_q_TK, ids_TK = log_q_TV.topk(TOPK, 1)
        log_p_TK = log_p_TV.gather(1, ids_TK)
        log_p_TJ, log_q_TJ = (torch.cat([t, log_tail(t)[:, None]], 1) for t in (log_p_TK, log_q_TK))
        return (log_p_TJ.exp() * (log_p_TJ - log_q_TJ)).sum(1)
    if loss == "reverse":
        return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(1)
    if loss == "forward":
        return (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(1)
    log_m_TV = torch.logaddexp(log_p_TV, log_q_TV) - torch.log(torch.tensor(2.0, device=log_p_TV.device))
    return 0.5 * ((log_p_TV.exp() * (log_p_TV - log_m_TV)).sum(1) + (log_q_TV.exp() * (log_q_TV - log_m_TV)).sum(1))


def liger(case: Case, loss: str, _: Head) -> Tensor:
    """The mean over the tokens by Liger-Kernel's fused linear JSD, which knows no weights per token."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    fused = LigerFusedLinearJSD(jsd_beta=0.5)
    return fused(case.student_TH, case.head_VH, case.teacher_TH, case.head_VH)


SIDES: dict[str, Callable[[Case, str, Head], Tensor]] = {
    "chunked": chunked, "materialised": materialised, "liger": liger}


def run(side: str, loss: str, options: argparse.Namespace, uniform: bool = False) -> Outcome:
    """One side, in this process. The peak is the first run's, which is not timed: nothing is kept from before.

    ``uniform``: all tokens count alike.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    case = Case.random(options, device)
    head = Head(case.head_VH, 0, options.vocab, None, options.chunk_tokens,
                resolve("auto", device, case.head_VH.dtype))
    if side == "liger" or uniform:
        case.weight_T.fill_(1 / options.tokens)

    def once() -> float:
        case.student_TH.grad = None
        value = SIDES[side](case, loss, head)
        total = value if value.dim() == 0 else (value * case.weight_T).sum()
        total.backward()
        return total.item()  # waits for the device

    warm_up(side, loss, options, device)
    value, peak_bytes = peak_of(once)
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return Outcome(value, case.student_TH.grad.float().cpu().numpy(), statistics.median(seconds), peak_bytes)


def warm_up(side: str, loss: str, options: argparse.Namespace, device: torch.device) -> None:
    """A case of few tokens loads what is loaded once (thread pools, kernels), so that no peak has it."""
    few = Case.random(argparse.Namespace(**vars(options) | {"tokens": 8, "vocab": TOPK * 4}), device)
    kernels = resolve("auto", device, few.head_VH.dtype)
    value = SIDES[side](few, loss, Head(few.head_VH, 0, TOPK * 4, None, kernels=kernels))
    value.sum().backward()


def measure(loss: str, options: argparse.Namespace, rate: float) -> dict:
    """One row: seconds, peaks, differences. Raises ArithmeticError where the sides disagree.

    Args:
        rate: FLOP/s of matrix products.
    """
    ideal_s = PRODUCTS[loss] * 2 * options.tokens * options.hidden * options.vocab / rate
    row: dict = {"loss": loss, "tokens": options.tokens, "hidden": options.hidden, "vocab": options.vocab,
                 "dtype": options.dtype, "ideal_s": ideal_s}
    outcomes: dict[str, Outcome] = {}
    for side in SIDES:
        reason = why_not(side, loss, options)
        if reason:
            row |= {f"{side}_s": None, f"{side}_peak_bytes": None, f"{side}_skipped": reason}
            print(f"  {loss:<9}{side:<14}skipped: {reason}", flush=True)
            continue
        outcome = outcomes[side] = in_a_process(run, side, loss, options)
        row |= {f"{side}_s": outcome.seconds, f"{side}_peak_bytes": outcome.peak_bytes}
        print(f"  {loss:<9}{side:<14}{outcome.seconds:9.3f} s{outcome.peak_bytes / 1e9:9.3f} GB", flush=True)
    if "liger" in outcomes:  # weighs all tokens alike
        outcomes["uniform"] = in_a_process(run, "chunked", loss, options, True)
    pairs = [(ours, theirs) for ours, theirs in (("chunked", "materialised"), ("uniform", "liger"))
             if theirs in outcomes]
    for ours, theirs in pairs:
        row |= (apart := compare(outcomes[ours], outcomes[theirs], theirs, TOLERANCE[options.dtype]))
        print(f"  {loss:<9}chunked and {theirs}: values and gradients differ by "
              f"{' and '.join(f'{value:.0e}' for value in apart.values())} of the largest", flush=True)
    print(f"  {loss:<9}ideal         {ideal_s:9.3f} s of {PRODUCTS[loss]} products; chunked reaches "
          f"{ideal_s / row['chunked_s']:.0%}", flush=True)
    return row


def compare(ours: Outcome, theirs: Outcome, name: str, tolerance: float) -> dict[str, float]:
    """Differences of value and gradient, relative to the largest. Raises ArithmeticError above the tolerance."""
    largest = float(np.abs(theirs.gradient_TH).max())
    gradient = float(np.abs(ours.gradient_TH - theirs.gradient_TH).max()) / largest
    value = abs(ours.value - theirs.value) / abs(theirs.value)
    for what, difference in (("values", value), ("gradients", gradient)):
        if not difference <= tolerance:
            raise ArithmeticError(f"chunked and {name}: {what} differ by {difference:.1e} of the largest; at most "
                                  f"{tolerance:.0e}")
    return {f"{name}_value_difference": value, f"{name}_gradient_difference": gradient}


def why_not(side: str, loss: str, options: argparse.Namespace) -> str | None:
    """Why a side cannot run here; None if it can."""
    if side == "liger":
        if loss != "jsd":
            return "its fused linear JSD is the divergence over the whole vocabulary"
        if not torch.cuda.is_available():
            return "needs a GPU"
        return None if importlib.util.find_spec("liger_kernel") else "pip install liger-kernel"
    if side == "materialised":
        needed = MATERIALISED_TENSORS * options.tokens * options.vocab * (8 if options.dtype == "float64" else 4)
        free = free_bytes()
        if needed > free:
            return f"needs up to {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; fewer --tokens, or more memory"
    return None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; the size is one that a machine with 16 GB holds, on a GPU that of an 8B model."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
            ("tokens", 8192 if on_gpu else 4096, "tokens"), ("hidden", 4096 if on_gpu else 1024, "hidden size"),
            ("vocab", 128256 if on_gpu else 151936, "vocabulary"),
            ("chunk-tokens", 0, "tokens of a chunk, as model.head_chunk_tokens; 0: by memory"),
            ("threads", 0, "CPU threads; 0: torch's choice"), ("repeats", 2, "timed runs of each side")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (%(default)s)")
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=["jsd", "topk"], help="losses (jsd topk)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bfloat16" if on_gpu else "float32",
                        help="of hidden states and head (%(default)s)")
    add_hardware_option(parser)
    add_json_option(parser, "write the first loss's numbers there, and all of them as rows, as they come")
    options = parser.parse_args(arguments)
    refuse_below(parser, options, tokens=1, hidden=1, vocab=TOPK + 1, chunk_tokens=0, threads=0, repeats=1)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write. 0; 1 when the sides disagree; 2 when the machine cannot."""
    options = parse(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    where = machine()
    if importlib.util.find_spec("liger_kernel"):
        where["liger_kernel"] = version("liger_kernel")
    print(f"{where['device']}: {where['cpu']}, {where['threads']} threads, load {where['load']:.1f}, torch "
          f"{where['torch']}; {options.tokens} tokens of {options.hidden}, vocabulary {options.vocab}, {options.dtype}",
          flush=True)
    rows: list[dict] = []
    try:
        rate = where["matrix_flops"] = peaks(options).flops(options.dtype)
        for loss in options.loss:
            rows.append(measure(loss, options, rate))
            save_json(options.json, rows[0] | {"rows": rows}, where, options)
    except (ArithmeticError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ArithmeticError) else 2
    return 0


if __name__ == "__main__":
    end(main)
