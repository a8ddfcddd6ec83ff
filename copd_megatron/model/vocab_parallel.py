"""Everything over the vocabulary: log-probs, entropy and top-k of the frozen, sharded head.

log p_v = z_v - log sum_u exp z_u with z = hidden weight^T / temperature. Logits exist for ``chunk_tokens``
tokens and one rank's shard of the vocabulary at a time, so that memory does not grow with tokens x vocabulary
(chunked losses: Hsu et al. 2024, arXiv:2410.10989; shards merged as in Shoeybi et al. 2019, arXiv:1909.08053).
And they exist once: what the backward needs of them, a mean of the head's rows per token, is taken in the forward.
Gradients go to the hidden states only, complete on every rank of the group.

Shape suffixes: T tokens, H hidden, V this rank's real vocabulary rows, K ids per token, J = 1 + K.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    logits_memory,
    math_dtype,
    shard_entropy_,
)
from copd_kernels.vocab_topk.reference import merge_topk

CHUNK_BYTES = {"cpu": 96 * 2**20, "cuda": 512 * 2**20}
"""What one tensor of a chunk's logits takes at most where the number of tokens is left open, by type of device. An
operation holds up to four of them. Many more tokens gain nothing on a CPU, where the product is bound by arithmetic
already; a GPU's kernels are a third faster per token with 1,024 tokens than with 165 (docs/performance.md)."""


def chunk_tokens_of(given: int, vocab_rows: int, itemsize: int, place: str) -> int:
    """Tokens whose logits exist at one time on a type of device, at least 1: ``given``, or for 0 as many as
    ``CHUNK_BYTES`` hold."""
    return given or max(1, CHUNK_BYTES["cuda" if place == "cuda" else "cpu"] // (max(1, vocab_rows) * itemsize))


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
        size = self._chunk_size(hidden_TH)
        return (slice(start, min(start + size, len(hidden_TH))) for start in range(0, len(hidden_TH), size))

    def logits_memory(self, hidden_TH: Tensor) -> Tensor | None:
        """For the logits of every chunk, see ``linear_logprob.reference.logits_memory``."""
        return logits_memory(hidden_TH, self.real_weight, min(self._chunk_size(hidden_TH), len(hidden_TH)))

    def _chunk_size(self, hidden_TH: Tensor) -> int:
        # Of the padded rows: a rank that holds only padding must join the collectives of every chunk.
        return chunk_tokens_of(self.chunk_tokens, self.weight.shape[0], math_dtype(hidden_TH).itemsize,
                               hidden_TH.device.type)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What :func:`score` says about T tokens; natural logs; float32, or float64 for float64 hidden states."""

    logprobs_T: Tensor
    """Log-prob of the target token; differentiable."""
    entropy_T: Tensor | None = None
    """Entropy of the whole softmax in nats; differentiable where that was asked for."""
    topk_ids_TK: Tensor | None = None
    """int64 global ids of the k most likely tokens, most likely first, equal logits by lowest id."""
    topk_logprobs_TK: Tensor | None = None
    """Their log-probs, never differentiable: pass the ids as ``at_ids_TK`` where a gradient is wanted."""
    at_logprobs_TK: Tensor | None = None
    """Log-probs at ``at_ids_TK``; differentiable."""


def score(hidden_TH: Tensor, head: Head, target_ids_T: Tensor, *, temperature: float = 1.0,
          entropy: bool = False, entropy_gradient: bool = False, topk: int = 0,
          at_ids_TK: Tensor | None = None) -> TokenScores:
    """Log-probs and more of the tokens that the hidden states predict.

    Args:
        hidden_TH: [T, H] final-normed hidden states, the same on every rank of ``head.group``.
        target_ids_T: [T] int64 global token ids, e.g. the sampled ones.
        temperature: > 0, divides the logits.
        entropy: also the entropy.
        entropy_gradient: the entropy is differentiable, at the cost of the logits once more in the backward.
        topk: also the k most likely tokens; 0 for none.
        at_ids_TK: [T, K] int64 global ids to score as well, e.g. the teacher's top-k.

    Returns:
        TokenScores, equal on every rank of the group. Backward sums the gradient of the hidden states
        over the group, and so assumes that every rank computes the same loss from these scores.

    Raises:
        ValueError: shapes do not fit, temperature <= 0, topk > vocabulary.
        RuntimeError: an id outside the vocabulary; on CUDA a device-side assertion.
    """
    check_hidden(hidden_TH, head, temperature)
    if not 0 <= topk <= head.vocab_size:
        raise ValueError(f"topk: {topk}; between 0 and the vocabulary's {head.vocab_size}")
    ids_TJ = target_ids_T[:, None] if at_ids_TK is None else torch.cat([target_ids_T[:, None], at_ids_TK], 1)
    check_ids(ids_TJ, hidden_TH, head)
    differentiable = torch.is_grad_enabled() and hidden_TH.requires_grad
    logprobs_TJ, entropy_T, topk_ids_TK, topk_logprobs_TK = everybodys(_Score.apply(
        own_tokens(hidden_TH, head), head, own_tokens(ids_TJ, head), temperature, entropy, topk,
        differentiable, entropy_gradient), head, len(ids_TJ))
    return TokenScores(logprobs_TJ[:, 0], entropy_T, topk_ids_TK, topk_logprobs_TK,
                       None if at_ids_TK is None else logprobs_TJ[:, 1:])


@torch.no_grad()
def shard_logits(hidden_TH: Tensor, head: Head, temperature: float = 1.0) -> Tensor:
    """[T, V] logits of this rank's real vocabulary rows, unchunked, without a graph: to sample a decode step.

    The global id of column v is ``head.vocab_start + v``; V is 0 on a rank that holds only padding.
    """
    check_hidden(hidden_TH, head, temperature)
    return block_logits(hidden_TH, head.real_weight, temperature)


def own_tokens(rows: Tensor, head: Head) -> Tensor:
    """This rank's equal part of the tokens, zeros filled up at the end; the backward gathers all parts."""
    if _alone(head.token_group) or not len(rows):
        return rows
    missing = -len(rows) % dist.get_world_size(head.token_group)
    padded = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return scatter_to_sequence_parallel_region(padded, group=head.token_group)


def everybodys(parts: Sequence[Tensor | None], head: Head, tokens: int) -> list[Tensor | None]:
    """All ranks' results, each [tokens, ...]; the backward takes this rank's part, as all have the same gradient."""
    if _alone(head.token_group) or not tokens:
        return list(parts)
    return [None if part is None else gather_from_sequence_parallel_region(
        part, tensor_parallel_output_grad=False, group=head.token_group)[:tokens] for part in parts]


def check_hidden(hidden_TH: Tensor, head: Head, temperature: float) -> None:
    if hidden_TH.dim() != 2 or hidden_TH.shape[1] != head.weight.shape[1]:
        raise ValueError(f"hidden_TH: {tuple(hidden_TH.shape)}; [T, {head.weight.shape[1]}]")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; above 0 (greedy decoding takes the top-1 instead)")


def check_ids(ids_TJ: Tensor, hidden_TH: Tensor, head: Head) -> None:
    if len(ids_TJ) != len(hidden_TH):
        raise ValueError(f"target_ids_T: {len(ids_TJ)} ids for {len(hidden_TH)} hidden states; one each")
    # Without waiting for the device: on CUDA it stops the process at its next synchronisation.
    torch._assert_async(((ids_TJ >= 0) & (ids_TJ < head.vocab_size)).all(),
                        f"target_ids_T, at_ids_TK: an id outside 0 to {head.vocab_size - 1}")


class _Score(torch.autograd.Function):
    """Chunked scores.

    A token's log-probs depend on its own hidden state alone, and on the logits only through the mean of the head's
    rows, which the forward takes while the logits exist: as many products as with logits that are kept. Where the
    entropy is differentiated, the backward computes each chunk's logits again instead. It needs one all-reduce, of
    [T, H].
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, head: Head, ids_TJ: Tensor, temperature: float, entropy: bool,
                topk: int, differentiable: bool, entropy_gradient: bool
                ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        ids_TJ = ids_TJ - head.vocab_start
        kept = differentiable and not entropy_gradient
        local, values_TK, topk_ids_TK = _shard_scores(hidden_TH, head, ids_TJ, temperature, entropy, topk, kept)
        lse_T, entropy_T, picked_TJ, rest_TH = _merge_scores(local, head.group)
        logprobs_TJ = picked_TJ - lse_T[:, None]
        if kept:
            ctx.save_for_backward(ids_TJ, logprobs_TJ, rest_TH)
        elif differentiable:
            ctx.save_for_backward(hidden_TH, ids_TJ, lse_T, entropy_T)
        ctx.head, ctx.temperature, ctx.kept, ctx.dtype = head, temperature, kept, hidden_TH.dtype
        ctx.set_materialize_grads(False)
        fixed = [] if entropy_gradient or entropy_T is None else [entropy_T]
        if topk:
            values_TK, topk_ids_TK = merge_shard_topk(values_TK, topk_ids_TK, head.group)
            values_TK = values_TK - lse_T[:, None]
            fixed += [topk_ids_TK, values_TK]
        ctx.mark_non_differentiable(*fixed)
        return logprobs_TJ, entropy_T, topk_ids_TK, values_TK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TJ: Tensor | None, grad_entropy_T: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_TJ is None and grad_entropy_T is None:
            return (None,) * 8
        gradient = _kept_gradient if ctx.kept else _recomputed_gradient
        return (sum_over(gradient(ctx, grad_TJ, grad_entropy_T), ctx.head.group).to(ctx.dtype), *(None,) * 7)


def _kept_gradient(ctx: Any, grad_TJ: Tensor, _: None) -> Tensor:
    ids_TJ, logprobs_TJ, rest_TH = ctx.saved_tensors
    head, grad_TH = ctx.head, torch.empty_like(rest_TH)
    picked_gradient = implementation("linear_logprob", head.kernels).picked_gradient
    for rows in head.chunks(rest_TH):
        grad_TH[rows] = picked_gradient(rest_TH[rows], head.real_weight, ids_TJ[rows], logprobs_TJ[rows],
                                        grad_TJ[rows], ctx.temperature)
    return grad_TH


def _recomputed_gradient(ctx: Any, grad_TJ: Tensor | None, grad_entropy_T: Tensor | None) -> Tensor:
    hidden_TH, ids_TJ, lse_T, entropy_T = ctx.saved_tensors
    head = ctx.head
    grad_TH = torch.empty(hidden_TH.shape, dtype=math_dtype(hidden_TH), device=hidden_TH.device)
    backward = implementation("linear_logprob", head.kernels).linear_logprob_backward
    for rows in head.chunks(hidden_TH):
        grad_TH[rows] = backward(
            hidden_TH[rows], head.real_weight, ids_TJ[rows], ctx.temperature, lse_T[rows],
            None if grad_TJ is None else grad_TJ[rows], None if entropy_T is None else entropy_T[rows],
            None if grad_entropy_T is None else grad_entropy_T[rows])
    return grad_TH


def _shard_scores(hidden_TH: Tensor, head: Head, ids_TJ: Tensor, temperature: float, entropy: bool, topk: int,
                  rest: bool) -> tuple[ShardScores, Tensor | None, Tensor | None]:
    """This shard's scores chunk by chunk, and its own top-k (logits, global ids) if asked."""
    weight, like = head.real_weight, {"dtype": math_dtype(hidden_TH), "device": hidden_TH.device}
    tokens = len(hidden_TH)
    whole = ShardScores(torch.empty(tokens, **like), torch.empty(tokens, **like) if entropy else None,
                        torch.empty(ids_TJ.shape, **like), torch.empty(hidden_TH.shape, **like) if rest else None)
    values_TK = torch.empty(tokens, topk, **like) if topk else None
    topk_ids_TK = torch.empty(tokens, topk, dtype=torch.int64, device=hidden_TH.device) if topk else None
    vocab_topk = implementation("vocab_topk", head.kernels).vocab_topk
    operator, memory_CV = implementation("linear_logprob", head.kernels), head.logits_memory(hidden_TH)
    for rows in head.chunks(hidden_TH):
        if topk:
            logits_TV = block_logits(hidden_TH[rows], weight, temperature, memory_CV)
            values_TK[rows], topk_ids_TK[rows], lse_T, picked_TJ = vocab_topk(logits_TV, topk, ids_TJ[rows])
            entropy_T = shard_entropy_(logits_TV, lse_T) if entropy else None  # and then these are log-probs
            own = ShardScores(lse_T, entropy_T, picked_TJ, operator.rest_(
                logits_TV, torch.zeros_like(lse_T) if entropy else lse_T, ids_TJ[rows], hidden_TH[rows], weight,
                temperature) if rest else None)
            del logits_TV  # or it lives on beside the next chunk's
        else:
            own = operator.linear_logprob(hidden_TH[rows], weight, ids_TJ[rows], temperature, entropy, rest, memory_CV)
        for column, part in zip(whole, own):
            if column is not None:
                column[rows] = part
    if topk:
        topk_ids_TK += head.vocab_start
    return whole, values_TK, topk_ids_TK


def _merge_scores(local: ShardScores, group: dist.ProcessGroup | None) -> ShardScores:
    """Scores over the whole vocabulary from every shard's, in two all-reduces of a few numbers per token.

    With s = exp(lse_shard - peak) and S the sum of all s: lse = peak + log S and
    H = sum (s H_shard - s log s) / S + log S. ``rest_TH`` stays the shard's part, of the whole softmax.
    """
    if _alone(group):
        return local
    peak_T = local.lse_T.clone()
    dist.all_reduce(peak_T, dist.ReduceOp.MAX, group)
    share_T = (local.lse_T - peak_T).exp()
    entropy_T = share_T if local.entropy_T is None else share_T * local.entropy_T + entr(share_T)
    packed = sum_over(torch.cat([torch.stack([share_T, entropy_T], 1), local.picked_TK], 1), group)
    log_sum_T = packed[:, 0].log()
    whole_T = None if local.entropy_T is None else packed[:, 1] / packed[:, 0] + log_sum_T
    rest_TH = None if local.rest_TH is None else local.rest_TH.mul_((share_T / packed[:, 0])[:, None])
    return ShardScores(peak_T + log_sum_T, whole_T, packed[:, 2:], rest_TH)


def merge_lse(lse: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """log sum exp over the ranks, elementwise."""
    if _alone(group):
        return lse
    peak = lse.clone()
    dist.all_reduce(peak, dist.ReduceOp.MAX, group)
    return peak + sum_over((lse - peak).exp(), group).log()


def merge_shard_topk(values_TK: Tensor, ids_TK: Tensor,
                     group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The k best of all shards; only k candidates per rank travel."""
    if _alone(group):
        return values_TK, ids_TK
    world, k = dist.get_world_size(group), values_TK.shape[1]
    values, ids = ([torch.empty_like(t) for _ in range(world)] for t in (values_TK, ids_TK))
    dist.all_gather(values, values_TK, group)
    dist.all_gather(ids, ids_TK, group)
    return merge_topk(torch.cat(values, 1), torch.cat(ids, 1), k)


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``tensor`` summed over the ranks, in place."""
    if not _alone(group):
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor


def _alone(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_world_size(group) == 1
