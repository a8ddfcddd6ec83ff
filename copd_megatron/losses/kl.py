"""Single-sample estimates of KL(policy || reference) from the log-probs of sampled tokens (Schulman 2020).

With d = log pi - log ref at a token that pi sampled:

    k1 = d                   unbiased, high variance, may be negative
    k2 = d^2 / 2             biased, low variance
    k3 = exp(-d) - 1 + d     unbiased, low variance, never negative

As a loss the gradient matters, not the value. E[grad k1] = E[grad log pi] = 0: k1 would penalise nothing. Its
gradient here is therefore k2's, d grad log pi, whose mean is the exact gradient of KL(policy || reference)
(the score-function estimate; Tang & Munos 2025, arXiv:2506.09477); its value stays k1. k2 is used as it is.
So is k3 (GRPO, arXiv:2402.03300): grad k3 = (1 - exp(-d)) grad log pi has the mean of the gradient of
KL(reference || policy), which agrees with the wanted one to first order near d = 0.
"""
from typing import Literal

from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""d below minus this counts as this inside k3's exponential; no gradient passes there."""


def kl_estimate(policy_logprobs_T: Tensor, reference_logprobs_T: Tensor,
                kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate per token, nats, differentiable in the policy only; the file's head gives value and gradient.

    Args:
        policy_logprobs_T: [T] natural logs of tokens that the policy itself sampled.
        reference_logprobs_T: [T] the same tokens under the reference, at the same temperature.

    Returns:
        [T], neither masked nor reduced, without a correction for tokens that an older policy sampled.
    """
    if policy_logprobs_T.shape != reference_logprobs_T.shape:
        raise ValueError(f"reference_logprobs_T: {tuple(reference_logprobs_T.shape)}; the policy's "
                         f"{tuple(policy_logprobs_T.shape)}")
    d_T = policy_logprobs_T - reference_logprobs_T.detach()
    if kind == "k3":
        return (-d_T).clamp_max(LOG_RATIO_LIMIT).exp() - 1 + d_T
    k2_T = d_T.square() / 2
    if kind == "k2":
        return k2_T
    if kind == "k1":
        return d_T.detach() + (k2_T - k2_T.detach())
    raise ValueError(f"kind: {kind!r}; k1, k2 or k3")
