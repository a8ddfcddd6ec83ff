"""Everything over the vocabulary: log-probs, entropy, top-k and full divergences of the frozen, sharded head.

log p_v = z_v - log sum_u exp z_u with z = hidden weight^T / temperature. Logits exist for ``chunk_tokens``
tokens and one rank's shard of the vocabulary at a time, forward and backward, so that memory does not grow
with tokens x vocabulary (chunked losses: Hsu et al. 2024, arXiv:2410.10989; shards merged as in Shoeybi et
al. 2019, arXiv:1909.08053). Gradients go to the hidden states only, complete on every rank of the group.

Shape suffixes: T tokens, H hidden, V this rank's real vocabulary rows, K ids per token, J = 1 + K.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.special import entr

from copd_kernels.backend import Backend, implementation
from copd_kernels.linear_logprob.reference import (
    ShardScores,
    block_logits,
    hidden_gradient,
    math_dtype,
    shard_entropy_,
)
from copd_kernels.vocab_topk.reference import merge_topk

DivergenceKind = Literal["reverse", "forward", "jsd"]
"""reverse: KL(student || teacher); forward: KL(teacher || student); jsd: generalised Jensen-Shannon."""


CHUNK_BYTES = 96 * 2**20
"""What one tensor of a chunk's logits takes at most where the number of tokens is left open. An operation holds up to
four of them; many more tokens gain nothing, since the product is already bound by arithmetic."""


def chunk_tokens_of(given: int, vocab_rows: int, itemsize: int) -> int:
    """Tokens whose logits exist at one time, at least 1: ``given``, or for 0 as many as ``CHUNK_BYTES`` hold."""
    return given or max(1, CHUNK_BYTES // (max(1, vocab_rows) * itemsize))


@dataclass(frozen=True, eq=False)
class Head:
    """One rank's shard of the frozen language-model head.

    Example: ``Head(weight, vocab_start=0, vocab_size=151936, group=None)``.
    """

    weight: Tensor
    """[V_padded / TP, H]; rows of ids >= ``vocab_size`` are padding and take no part in anything."""
    vocab_start: int
    """Global id of the shard's first row."""
    vocab_size: int
    """Real size of the vocabulary, over all ranks."""
    group: dist.ProcessGroup | None = None
    """The tensor-parallel group; None: the shard is the whole vocabulary."""
    chunk_tokens: int = 0
    """Tokens whose logits exist at one time; 0: as many as ``CHUNK_BYTES`` hold."""
    kernels: Backend = "reference"
    """What evaluates them."""
    token_group: dist.ProcessGroup | None = None
    """Ranks with the same hidden states (context parallelism) that share out the tokens of a call: each evaluates an
    equal part, and all get all results and the whole gradient. None: every rank evaluates all tokens."""

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or not self.weight.is_floating_point():
            raise ValueError(f"weight: {self.weight.dtype} {tuple(self.weight.shape)}; floats [V, H]")
        if self.vocab_start < 0 or self.vocab_size < 1 or self.chunk_tokens < 0:
            raise ValueError(f"vocab_start, vocab_size, chunk_tokens: {self.vocab_start}, {self.vocab_size}, "
                             f"{self.chunk_tokens}; at least 0, 1, 0")
        if self.group is None and self.vocab_start + self.weight.shape[0] < self.vocab_size:
            raise ValueError(f"weight: {self.weight.shape[0]} rows from id {self.vocab_start} of "
                             f"{self.vocab_size} ids; a shard needs its group")

    @property
    def real_weight(self) -> Tensor:
        """[V, H] view without padded rows and without a graph; V is 0 on a rank that holds only padding."""
        return self.weight.detach()[:max(0, self.vocab_size - self.vocab_start)]

    def chunks(self, hidden_TH: Tensor) -> Iterator[slice]:
        """Rows of ``hidden_TH`` whose logits exist together, equally many on every rank of the group."""
        # Of the padded rows: a rank that holds only padding must join the collectives of every chunk.
        size = chunk_tokens_of(self.chunk_tokens, self.weight.shape[0], math_dtype(hidden_TH).itemsize)
        return (slice(start, min(start + size, len(hidden_TH))) for start in range(0, len(hidden_TH), size))


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What :func:`score` says about T tokens; natural logs; float32, or float64 for float64 hidden states."""

    logprobs_T: Tensor
    """Log-prob of the target token; differentiable."""
    entropy_T: Tensor | None = None
    """Entropy of the whole softmax in nats; differentiable."""
    topk_ids_TK: Tensor | None = None
    """int64 global ids of the k most likely tokens, most likely first, equal logits by lowest id."""
    topk_logprobs_TK: Tensor | None = None
    """Their log-probs, never differentiable: pass the ids as ``at_ids_TK`` where a gradient is wanted."""
    at_logprobs_TK: Tensor | None = None
    """Log-probs at ``at_ids_TK``; differentiable."""


def score(hidden_TH: Tensor, head: Head, target_ids_T: Tensor, *, temperature: float = 1.0,
          entropy: bool = False, topk: int = 0, at_ids_TK: Tensor | None = None) -> TokenScores:
    """Log-probs and more of the tokens that the hidden states predict.

    Args:
        hidden_TH: [T, H] final-normed hidden states, the same on every rank of ``head.group``.
        target_ids_T: [T] int64 global token ids, e.g. the sampled ones.
        temperature: > 0, divides the logits.
        entropy: also the entropy.
        topk: also the k most likely tokens; 0 for none.
        at_ids_TK: [T, K] int64 global ids to score as well, e.g. the teacher's top-k.

    Returns:
        TokenScores, equal on every rank of the group. Backward sums the gradient of the hidden states
        over the group, and so assumes that every rank computes the same loss from these scores.

    Raises:
        ValueError: shapes do not fit, an id outside the vocabulary, temperature <= 0, topk > vocabulary.
    """
    _check_hidden(hidden_TH, head, temperature)
    if not 0 <= topk <= head.vocab_size:
        raise ValueError(f"topk: {topk}; between 0 and the vocabulary's {head.vocab_size}")
    ids_TJ = target_ids_T[:, None] if at_ids_TK is None else torch.cat([target_ids_T[:, None], at_ids_TK], 1)
    if len(ids_TJ) != len(hidden_TH):
        raise ValueError(f"target_ids_T: {len(ids_TJ)} ids for {len(hidden_TH)} hidden states; one each")
    if bool(((ids_TJ < 0) | (ids_TJ >= head.vocab_size)).any()):
        raise ValueError(f"target_ids_T, at_ids_TK: from {int(ids_TJ.min())} to {int(ids_TJ.max())}; "
                         f"0 to {head.vocab_size - 1}")
    logprobs_TJ, entropy_T, topk_ids_TK, topk_logprobs_TK = _everybodys(_Score.apply(
        _own_tokens(hidden_TH, head), head, _own_tokens(ids_TJ, head), temperature, entropy, topk), head, len(ids_TJ))
    return TokenScores(logprobs_TJ[:, 0], entropy_T, topk_ids_TK, topk_logprobs_TK,
                       None if at_ids_TK is None else logprobs_TJ[:, 1:])


def full_divergence(student_hidden_TH: Tensor, teacher_hidden_TH: Tensor, head: Head,
                    kind: DivergenceKind = "reverse", *, temperature: float = 1.0,
                    jsd_weight: float = 0.5) -> Tensor:
    """Exact divergence over the whole vocabulary, per token; the gradient goes to the student only.

    Args:
        student_hidden_TH, teacher_hidden_TH: [T, H] final-normed hidden states, the same on every rank.
        kind: see :data:`DivergenceKind`.
        jsd_weight: the teacher's share of the mixture, in (0, 1); only read for ``jsd``.

    Returns:
        [T] nats, float32 (float64 for float64 hidden states), equal on every rank of ``head.group``.
    """
    _check_hidden(student_hidden_TH, head, temperature)
    if teacher_hidden_TH.shape != student_hidden_TH.shape:
        raise ValueError(f"teacher_hidden_TH: {tuple(teacher_hidden_TH.shape)}; the student's "
                         f"{tuple(student_hidden_TH.shape)}")
    if kind not in ("reverse", "forward", "jsd"):
        raise ValueError(f"kind: {kind!r}; reverse, forward or jsd")
    if not 0 < jsd_weight < 1:
        raise ValueError(f"jsd_weight: {jsd_weight}; between 0 and 1, both excluded")
    teacher_hidden_TH = teacher_hidden_TH.detach().to(student_hidden_TH.dtype)
    differentiable = torch.is_grad_enabled() and student_hidden_TH.requires_grad
    own = _FullDivergence.apply(_own_tokens(student_hidden_TH, head), _own_tokens(teacher_hidden_TH, head), head,
                                kind, temperature, jsd_weight, differentiable)
    return _everybodys([own], head, len(student_hidden_TH))[0]


@torch.no_grad()
def shard_logits(hidden_TH: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """[T, V] logits of this rank's real vocabulary rows, unchunked, without a graph: to sample a decode step.

    The global id of column v is ``head.vocab_start + v``; V is 0 on a rank that holds only padding.
    """
    _check_hidden(hidden_TH, head, temperature)
    return block_logits(hidden_TH, head.real_weight, temperature)


def _own_tokens(rows: Tensor, head: Head) -> Tensor:
    """This rank's equal part of the tokens, zeros filled up at the end; the backward gathers all parts."""
    if _alone(head.token_group) or not len(rows):
        return rows
    missing = -len(rows) % dist.get_world_size(head.token_group)
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return scatter_to_sequence_parallel_region(padded, group=head.token_group)


def _everybodys(parts: Sequence[Tensor | None], head: Head, tokens: int) -> list[Tensor | None]:
    """All ranks' results, each [tokens, ...]; the backward takes this rank's part, as all have the same gradient."""
    if _alone(head.token_group) or not tokens:
        return list(parts)
    return [None if part is None else gather_from_sequence_parallel_region(
        part, tensor_parallel_output_grad=False, group=head.token_group)[:tokens] for part in parts]


def _check_hidden(hidden_TH: Tensor, head: Head, temperature: float) -> None:
    if hidden_TH.dim() != 2 or hidden_TH.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden_TH: {tuple(hidden_TH.shape)}; [T, {head.weight.shape[1]}]")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; above 0 (greedy decoding takes the top-1 instead)")


class _Score(torch.autograd.Function):
    """Chunked scores; the backward recomputes each chunk's logits and needs one all-reduce, of [T, H]."""

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, head: Head, ids_TJ: Tensor, temperature: float, entropy: bool,
                topk: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        ids_TJ = ids_TJ - head.vocab_start
        local, values_TK, topk_ids_TK = _shard_scores(hidden_TH, head, ids_TJ, temperature, entropy, topk)
        lse_T, entropy_T, picked_TJ = _merge_scores(local, head.group)
        ctx.save_for_backward(hidden_TH, ids_TJ, lse_T, entropy_T)
        ctx.head, ctx.temperature = head, temperature
        ctx.set_materialize_grads(False)
        if topk:
            values_TK, topk_ids_TK = _merge_shard_topk(values_TK, topk_ids_TK, head.group)
            values_TK = values_TK - lse_T[:, None]
            ctx.mark_non_differentiable(topk_ids_TK, values_TK)
        return picked_TJ - lse_T[:, None], entropy_T, topk_ids_TK, values_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TJ: Tensor | None, grad_entropy_T: Tensor | None, *_: Any) -> tuple[Any, ...]:
        hidden_TH, ids_TJ, lse_T, entropy_T = ctx.saved_tensors
        if grad_TJ is None and grad_entropy_T is None:
            return (None,) * 6
        grad_TH = torch.empty(hidden_TH.shape, dtype=math_dtype(hidden_TH), device=hidden_TH.device)
        backward = implementation("linear_logprob", ctx.head.kernels).linear_logprob_backward
        for rows in ctx.head.chunks(hidden_TH):
            grad_TH[rows] = backward(
                hidden_TH[rows], ctx.head.real_weight, ids_TJ[rows], ctx.temperature, lse_T[rows],
                None if grad_TJ is None else grad_TJ[rows], None if entropy_T is None else entropy_T[rows],
                None if grad_entropy_T is None else grad_entropy_T[rows])
        return (_sum_over(grad_TH, ctx.head.group).to(hidden_TH.dtype), *(None,) * 5)


class _FullDivergence(torch.autograd.Function):
    """Chunked full-vocabulary divergence.

    A token's value depends on its own hidden state alone. So the forward takes the gradient of every value while
    its logits exist, and the backward only scales the rows: as many products as with logits that are kept.
    """

    @staticmethod
    def forward(ctx: Any, student_TH: Tensor, teacher_TH: Tensor, head: Head, kind: str, temperature: float,
                jsd_weight: float, differentiable: bool) -> Tensor:
        like = {"dtype": math_dtype(student_TH), "device": student_TH.device}
        value_T = torch.zeros(len(student_TH), **like)
        slope_TH = torch.empty(student_TH.shape, **like) if differentiable else None
        for rows in head.chunks(student_TH):
            value_T[rows], slope_BH = _chunk_divergence(student_TH[rows], teacher_TH[rows], head, kind, temperature,
                                                        jsd_weight, differentiable)
            if slope_TH is not None:
                slope_TH[rows] = slope_BH
        ctx.save_for_backward(slope_TH)
        ctx.group, ctx.dtype = head.group, student_TH.dtype
        return value_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Any, ...]:
        slope_TH, = ctx.saved_tensors
        return (_sum_over(slope_TH * grad_T[:, None], ctx.group).to(ctx.dtype), *(None,) * 6)


def _chunk_divergence(student_TH: Tensor, teacher_TH: Tensor, head: Head, kind: str, temperature: float,
                      jsd_weight: float, differentiable: bool) -> tuple[Tensor, Tensor | None]:
    """Values [T] of a chunk's tokens over the whole vocabulary, and this shard's part of their gradients [T, H].

    A function of its own, so that no chunk's tensors live on beside the next one's.
    """
    student_TV = block_logits(student_TH, head.real_weight, temperature)
    teacher_TV = block_logits(teacher_TH, head.real_weight, temperature)
    lse_T2 = _merge_lse(torch.stack([student_TV.logsumexp(1), teacher_TV.logsumexp(1)], 1), head.group)
    student_TV.sub_(lse_T2[:, :1])
    teacher_TV.sub_(lse_T2[:, 1:])
    local_T, probs_TV, pull_TV = _divergence_(student_TV, teacher_TV, kind, jsd_weight)
    sums_T2 = _sum_over(torch.stack([local_T, pull_TV.sum(1)], 1), head.group)
    if not differentiable:
        return sums_T2[:, 0], None
    grad_TV = pull_TV.sub_(probs_TV.mul_(sums_T2[:, 1:]))
    return sums_T2[:, 0], hidden_gradient(grad_TV, student_TH, head.real_weight, temperature)


def _divergence_(log_p_TV: Tensor, log_q_TV: Tensor, kind: str, jsd_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """This shard's part [T] of the divergence of the student's p, then p [T, V] and p c [T, V]. Overwrites both inputs.

    c is the derivative by p: log p - log q for reverse, -q / p for forward, (1 - w)(log p - log m) for
    Jensen-Shannon. The gradient of the logits is p c - p sum(p c), the sum over the whole vocabulary.
    """
    if kind == "reverse":
        gap_TV, probs_TV = log_q_TV.neg_().add_(log_p_TV), log_p_TV.exp_()
        pull_TV = gap_TV.mul_(probs_TV)
        return pull_TV.sum(1), probs_TV, pull_TV
    if kind == "forward":
        gap_TV, pull_TV = log_q_TV - log_p_TV, log_q_TV.exp_().neg_()
        return -gap_TV.mul_(pull_TV).sum(1), log_p_TV.exp_(), pull_TV
    log_m_TV = _log_mixture(log_p_TV, log_q_TV, jsd_weight)
    gap_TV = log_q_TV - log_m_TV
    teacher_T = gap_TV.mul_(log_q_TV.exp_()).sum(1)
    pull_TV, probs_TV = log_m_TV.neg_().add_(log_p_TV).mul_(1 - jsd_weight), log_p_TV.exp_()
    pull_TV.mul_(probs_TV)
    return pull_TV.sum(1).add_(teacher_T, alpha=jsd_weight), probs_TV, pull_TV


def _log_mixture(log_p_TV: Tensor, log_q_TV: Tensor, teacher_share: float) -> Tensor:
    log_m_TV = log_p_TV + math.log1p(-teacher_share)
    return torch.logaddexp(log_m_TV, log_q_TV + math.log(teacher_share), out=log_m_TV)


def _shard_scores(hidden_TH: Tensor, head: Head, ids_TJ: Tensor, temperature: float, entropy: bool,
                  topk: int) -> tuple[ShardScores, Tensor | None, Tensor | None]:
    """This shard's scores chunk by chunk, and its own top-k (logits, global ids) if asked."""
    weight, like = head.real_weight, {"dtype": math_dtype(hidden_TH), "device": hidden_TH.device}
    tokens = len(hidden_TH)
    lse_T, picked_TJ = torch.empty(tokens, **like), torch.empty(ids_TJ.shape, **like)
    entropy_T = torch.empty(tokens, **like) if entropy else None
    values_TK = torch.empty(tokens, topk, **like) if topk else None
    topk_ids_TK = torch.empty(tokens, topk, dtype=torch.int64, device=hidden_TH.device) if topk else None
    vocab_topk = implementation("vocab_topk", head.kernels).vocab_topk
    linear_logprob = implementation("linear_logprob", head.kernels).linear_logprob
    for rows in head.chunks(hidden_TH):
        if topk:
            logits_TV = block_logits(hidden_TH[rows], weight, temperature)
            values_TK[rows], topk_ids_TK[rows], lse_T[rows], picked_TJ[rows] = vocab_topk(logits_TV, topk, ids_TJ[rows])
            block_entropy_T = shard_entropy_(logits_TV, lse_T[rows]) if entropy else None
        else:
            lse_T[rows], block_entropy_T, picked_TJ[rows] = linear_logprob(
                hidden_TH[rows], weight, ids_TJ[rows], temperature, entropy)
        if entropy:
            entropy_T[rows] = block_entropy_T
    if topk:
        topk_ids_TK += head.vocab_start
    return ShardScores(lse_T, entropy_T, picked_TJ), values_TK, topk_ids_TK


def _merge_scores(local: ShardScores, group: dist.ProcessGroup | None) -> ShardScores:
    """Scores over the whole vocabulary from every shard's, in two all-reduces of a few numbers per token.

    With s = exp(lse_shard - peak) and S the sum of all s: lse = peak + log S and
    H = sum (s H_shard - s log s) / S + log S.
    """
    if _alone(group):
        return local
    peak_T = local.lse_T.clone()
    dist.all_reduce(peak_T, dist.ReduceOp.MAX, group)
    share_T = (local.lse_T - peak_T).exp()
    entropy_T = share_T if local.entropy_T is None else share_T * local.entropy_T + entr(share_T)
    packed = _sum_over(torch.cat([torch.stack([share_T, entropy_T], 1), local.picked_TK], 1), group)
    log_sum_T = packed[:, 0].log()
    whole_T = None if local.entropy_T is None else packed[:, 1] / packed[:, 0] + log_sum_T
    return ShardScores(peak_T + log_sum_T, whole_T, packed[:, 2:])


def _merge_lse(lse: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp over the ranks, elementwise."""
    if _alone(group):
        return lse
    peak = lse.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    return peak + _sum_over((lse - peak).exp(), group).log()


def _merge_shard_topk(values_TK: Tensor, ids_TK: Tensor,
                      group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The k best of all shards; only k candidates per rank travel."""
    if _alone(group):
        return values_TK, ids_TK
    world, k = dist.get_world_size(group), values_TK.shape[1]
    values, ids = ([torch.empty_like(t) for _ in range(world)] for t in (values_TK, ids_TK))
    dist.all_gather(values, values_TK, group)
    dist.all_gather(ids, ids_TK, group)
    return merge_topk(torch.cat(values, 1), torch.cat(ids, 1), k)


def _sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``tensor`` summed over the ranks, in place."""
    if not _alone(group):
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor


def _alone(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == 1
