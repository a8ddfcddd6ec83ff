"""What every rollout engine takes and gives; ``tests/rollout/engine_contract.py`` states what it must do.

A request asks for the completions of one prompt by one policy. An engine answers many requests at once and
may batch them as it likes: what comes back depends on the request, the weights and the seed alone.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from copd_megatron.types import Completion, Prompt, Segment

VisualSource = Callable[[Sequence[Prompt]], tuple[Tensor, Sequence[Tensor]] | None]
"""Prompts -> merged features [n, H] of all their visual tokens in order, and the deepstack features [n, H] of
each depth; None without visual tokens. ``VisionTower.features`` is one."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn.

    Example: ``SamplingParams(max_tokens=64, stop_token_ids=(151645,))``.
    """

    max_tokens: int
    """New tokens at most; a completion that reaches them without a stop token ends with "length"."""
    stop_token_ids: tuple[int, ...]
    """Any of these ends the completion and is kept as its last token; may be empty."""
    temperature: float = 1.0
    """Divides the logits; > 0. Not read when ``greedy``."""
    top_p: float = 1.0
    """Mass of the nucleus, 0 < top_p <= 1: the fewest most likely tokens that reach it (all that tie with the
    last of them included; Holtzman et al. 2020, arXiv:1904.09751). Not read when ``greedy``."""
    greedy: bool = False
    """Take the most likely token, the lowest id among equals."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens}; at least 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}; above 0 (greedy takes the most likely token)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}; above 0, at most 1")


@dataclass(frozen=True, eq=False)
class Request:
    """Completions wanted of one prompt.

    Example: ``Request(prompt, "text", samples=8, params=params, noise_key=(step,))``.
    """

    prompt: Prompt
    expert: str | None
    """The policy that answers; None is the backbone itself."""
    samples: int
    """Completions of this request."""
    params: SamplingParams
    noise_key: tuple[int, ...]
    """What the noise is for, e.g. (step,): equal keys give equal completions, others independent ones."""
    sample_offset: int = 0
    """Number of the first completion within its group; sets ``Completion.sample`` and the noise."""
    prior: tuple[Segment, ...] = ()
    """Earlier segments of the completion, the environment's last, which every sample goes on from."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples} of prompt {self.prompt.key!r}; at least 1")

    @property
    def prior_tokens(self) -> int:
        """Completion tokens that exist already."""
        return sum(len(segment.token_ids) for segment in self.prior)


@dataclass
class EngineCounters:
    """Work done since the engine was made, for the share of tokens saved; equal on all ranks of a replica."""

    prompt_tokens_asked: int = 0
    """Prompt tokens of every completion, as if each had its own copy."""
    prompt_tokens_computed: float = 0.0
    """Prompt tokens that passed the layers, averaged over the layers (lower ones may share more)."""
    decoded_tokens: int = 0
    """New tokens of all completions."""


class RolloutEngine(Protocol):
    """Samples completions. Every rank of the replica makes the same call and gets the same answer."""

    counters: EngineCounters

    def generate(self, requests: Sequence[Request],
                 visual: VisualSource | None = None) -> list[list[Completion]]:
        """The completions of each request, in order: sample ``sample_offset`` first.

        A completion's segments are the request's ``prior`` and one new "policy" segment, whose ``logprobs``
        are at the training temperature and untruncated, and whose ``sampled_logprobs`` belong to the
        distribution that was sampled from (0 when greedy). ``text`` and rewards are left to the caller.

        Args:
            visual: features of prompts with media; needed when a prompt has any.

        Raises:
            UserError: a policy that this engine does not hold, or a prompt longer than
                ``rollout.max_prompt_tokens``.
            ValueError: a stop token outside the vocabulary, media without ``visual``.
        """
