"""Sampling: how completions are generated for training."""
from typing import Literal

from pydantic import Field

from copd_megatron.config.section import Section


class RolloutConfig(Section):
    """The rollout engine and its sampling settings for training."""

    engine: Literal["megatron"] = "megatron"
    """``megatron`` decodes on the training shards themselves."""
    prompts_per_step: int = Field(256, ge=1)
    """Prompts per expert and step (native batch)."""
    group_size: int = Field(8, ge=2)
    """Completions per prompt, G: their rewards are compared with each other."""
    temperature: float = Field(1.0, gt=0)
    """Sampling and training temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass. Training requires 1.0: log-probs must be those of the distribution sampled."""
    max_completion_tokens: int = Field(1024, ge=1)
    """Completions are cut here; the cut ones count as truncated."""
    max_prompt_tokens: int = Field(16384, ge=1)
    """Most tokens of a prompt, media and generation header included."""
    long_prompts: Literal["refuse", "drop"] = "refuse"
    """What happens to longer ones. ``refuse``: the run stops at the first. ``drop``: every question of finite tasks is
    measured at the start, longer ones are left out of both splits, and the log says how many."""
    decode_lanes: int = Field(1024, ge=1)
    """Completions that decode together; bounds the KV cache."""
    prefix_store_bytes: int = Field(0, ge=0)
    """Memory per rank for keys and values of prompts that are kept beyond one batch of requests and found again by
    content; the least recently used go first. 0: off, prompts of a batch are evaluated side by side. With a store
    each is evaluated alone, so that what is found equals what is computed bit for bit; on short prompts that is
    slower. It pays in scope ``completion`` (a prompt is evaluated once per step for rollout, scoring and update of all
    experts, and stays valid), in part with ``adapter.first_layer``, and for episodes of several turns; see
    docs/performance.md."""
    lower_states_bytes: int = Field(0, ge=0)
    """Memory per rank for hidden states that enter ``adapter.first_layer``, of completions and prompts, kept from a
    step's rollout until its update, so that scoring and update begin there: hidden size numbers per token, on the
    pipeline stage that holds the layer. What finds no room is evaluated from the lowest layer on. Decoding rounds
    differently than scoring, so that results are the same up to rounding. 0: off; more needs ``adapter.first_layer``
    above 0; see docs/performance.md."""
