"""Correction and measures of the mismatch between the engine that sampled and the trainer that learns.

The tokens come from pi_engine but the gradient wants pi_trainer (old policy), so a token's loss is weighted
with w = pi_trainer(y_t) / pi_engine(y_t): truncated to w <= C (Espeholt et al. 2018, arXiv:1802.01561), or
masked, w inside [1 / C, C] and 0 outside. Weights are detached.
"""
from typing import Literal

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""|log w| beyond this counts as this, so that nothing overflows."""


def _log_weights(trainer_logprobs_T: Tensor, engine_logprobs_T: Tensor) -> Tensor:
    if trainer_logprobs_T.shape != engine_logprobs_T.shape:
        raise ValueError(f"engine_logprobs_T: {tuple(engine_logprobs_T.shape)}; the trainer's "
                         f"{tuple(trainer_logprobs_T.shape)}")
    return (trainer_logprobs_T - engine_logprobs_T).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_weights(trainer_logprobs_T: Tensor, engine_logprobs_T: Tensor,
                       kind: Literal["none", "truncated", "masked"], cap: float = 2.0) -> Tensor:
    """[T] detached weights of the tokens' losses.

    Args:
        trainer_logprobs_T: [T] the old policy's natural logs, from the trainer.
        engine_logprobs_T: [T] natural logs of the distribution that the engine really sampled from.
        cap: > 1.
    """
    weights_T = _log_weights(trainer_logprobs_T, engine_logprobs_T).exp()
    if cap <= 1:
        raise ValueError(f"cap: {cap}; above 1")
    if kind == "none":
        return torch.ones_like(weights_T)
    if kind == "truncated":
        return weights_T.clamp_max(cap)
    if kind == "masked":
        return weights_T.masked_fill((weights_T < 1 / cap) | (weights_T > cap), 0)
    raise ValueError(f"kind: {kind!r}; none, truncated or masked")


def mismatch(trainer_logprobs_T: Tensor, engine_logprobs_T: Tensor) -> dict[str, Tensor]:
    """How far engine and trainer are apart, per token and detached; reduce with the loss mask.

    Returns:
        ``logprob_gap`` |log pi_trainer - log pi_engine| (its mean and maximum are worth watching),
        ``prob_gap`` |pi_trainer - pi_engine|, ``kl`` the k3 estimate of KL(engine || trainer), ``weight`` the
        importance weight; [T] each.
    """
    log_weights_T = _log_weights(trainer_logprobs_T, engine_logprobs_T)
    trainer_T, engine_T = trainer_logprobs_T.detach(), engine_logprobs_T.detach()
    return {"logprob_gap": (trainer_T - engine_T).abs(), "prob_gap": (trainer_T.exp() - engine_T.exp()).abs(),
            "kl": log_weights_T.exp() - 1 - log_weights_T, "weight": log_weights_T.exp()}
