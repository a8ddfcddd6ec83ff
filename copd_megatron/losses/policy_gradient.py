"""Policy-gradient surrogates per token; with ratio r = pi / pi_old and advantage A:

clip   -min(r A, clip(r, 1 - low, 1 + high) A)           PPO (arXiv:1707.06347); DAPO's clip-higher has
                                                         high > low (arXiv:2503.14476)
       at most -c A for A < 0 with dual_clip c           Ye et al. 2020, arXiv:1912.09729
gspo   the same with r = exp(mean over the sequence of log pi / pi_old), in the token form whose gradient
       weighs each token's own advantage                 Zheng et al. 2025, arXiv:2507.18071
cispo  -sg(clip(r, 1 - low, 1 + high)) A log pi          MiniMax 2025, arXiv:2506.13585

Where the old policy is the current one (one update per rollout) r is 1 and all three have the gradient
-A grad log pi. Losses are per token; ``losses.reduction`` turns them into one number.
"""
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""|log pi / pi_old| beyond this counts as this, so that no ratio overflows; no gradient passes there."""


def sequence_mean(values_T: Tensor, sequence_ids_T: Tensor, loss_mask_T: Tensor | None = None) -> Tensor:
    """[T] mean of ``values_T`` over the loss tokens of each token's sequence (0 if it has none).

    Args:
        sequence_ids_T: [T] int64 >= 0; equal ids are one sequence, which must be here as a whole.
    """
    mask_T = torch.ones_like(values_T) if loss_mask_T is None else loss_mask_T.to(values_T.dtype)
    # How many sequences there are only the device knows, and asking it would be a wait: they are numbered, with room
    # for T of them.
    ids_T, order_T = sequence_ids_T.sort()
    number_T = torch.zeros_like(ids_T)
    number_T[1:] = (ids_T[1:] != ids_T[:-1]).cumsum(0)
    number_T = torch.empty_like(number_T).scatter_(0, order_T, number_T)
    sums_T = torch.zeros_like(values_T).index_add(0, number_T, values_T * mask_T)
    counts_T = torch.zeros_like(values_T).index_add(0, number_T, mask_T)
    return (sums_T / counts_T.clamp_min(1))[number_T]


def surrogate(kind: Literal["clip", "gspo", "cispo"], policy_logprobs_T: Tensor, old_logprobs_T: Tensor,
              advantages_T: Tensor, sequence_ids_T: Tensor | None = None, clip_low: float = 0.2,
              clip_high: float = 0.28, dual_clip: float | None = None, *,
              loss_mask_T: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss per token of one policy-gradient variant.

    Args:
        policy_logprobs_T: [T] natural logs of the sampled tokens; carries the gradient.
        old_logprobs_T: [T] the same under the policy that sampled; detached here.
        advantages_T: [T]; detached here. For OPD: beta * (teacher - student).
        sequence_ids_T: [T] int64 >= 0, which sequence a token belongs to; needed by ``gspo``.
        clip_low, clip_high: the ratio's range is [1 - clip_low, 1 + clip_high].
        dual_clip: > 1, bound on the ratio for negative advantages; not for ``cispo``.
        loss_mask_T: [T] bool, False for tokens that the policy did not sample: their loss is 0 and they
            do not enter ``gspo``'s means. None: all carry loss.

    Returns:
        loss [T], and statistics [T], detached, 0 at masked tokens: ``ratio``; ``clipped``, 1 where the clip
        range stops the gradient or, for ``cispo``, caps the weight; ``dual_clipped``, 1 where dual_clip does.
    """
    _check(kind, policy_logprobs_T, old_logprobs_T, advantages_T, clip_low, clip_high, dual_clip)
    advantages_T = advantages_T.detach()
    log_ratio_T = policy_logprobs_T - old_logprobs_T.detach()
    if loss_mask_T is not None:
        # Before the exponential: what masked tokens hold must not reach the gradient, not even as 0 x inf.
        log_ratio_T = log_ratio_T.masked_fill(~loss_mask_T, 0)
        advantages_T = advantages_T.masked_fill(~loss_mask_T, 0)
    if kind == "gspo":
        if sequence_ids_T is None:
            raise ValueError("sequence_ids_T: none; gspo needs the sequence of every token")
        mean_T = sequence_mean(log_ratio_T.detach(), sequence_ids_T, loss_mask_T)
        log_ratio_T = mean_T + (log_ratio_T - log_ratio_T.detach())
    ratio_T = log_ratio_T.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    dual_clipped_T = torch.zeros_like(ratio_T, dtype=torch.bool)
    if kind == "cispo":
        loss_T = -bounded_T.detach() * advantages_T * policy_logprobs_T
        if loss_mask_T is not None:
            loss_T = loss_T.masked_fill(~loss_mask_T, 0)
        clipped_T = ratio_T != bounded_T
    else:
        free_T, held_T = -ratio_T * advantages_T, -bounded_T * advantages_T
        loss_T, clipped_T = torch.maximum(free_T, held_T), held_T > free_T
        if dual_clip is not None:
            bound_T = -dual_clip * advantages_T
            dual_clipped_T = (advantages_T < 0) & (loss_T > bound_T)
            loss_T = torch.where(dual_clipped_T, bound_T, loss_T)
    statistics = {"ratio": ratio_T, "clipped": clipped_T, "dual_clipped": dual_clipped_T}
    keep = 1.0 if loss_mask_T is None else loss_mask_T.to(ratio_T.dtype)
    return loss_T, {name: value.detach().to(ratio_T.dtype) * keep for name, value in statistics.items()}


def _check(kind: str, policy_T: Tensor, old_T: Tensor, advantages_T: Tensor, clip_low: float,
           clip_high: float, dual_clip: float | None) -> None:
    if kind not in ("clip", "gspo", "cispo"):
        raise ValueError(f"kind: {kind!r}; clip, gspo or cispo")
    if not policy_T.shape == old_T.shape == advantages_T.shape:
        raise ValueError(f"policy, old and advantages: {tuple(policy_T.shape)}, {tuple(old_T.shape)}, "
                         f"{tuple(advantages_T.shape)}; one shape")
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low, clip_high: {clip_low}, {clip_high}; at least 0")
    if dual_clip is not None and (kind == "cispo" or dual_clip <= 1):
        raise ValueError(f"dual_clip: {dual_clip} with {kind}; above 1, and only with clip or gspo")
