"""What training would see: rendered prompts, sampled answers and how they are graded, before any GPU-hour is spent."""
from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from copd_megatron.config.run import RunConfig
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.rollout.collector import sampling_params
from copd_megatron.rollout.engine import Request
from copd_megatron.trainer.build import build_policies
from copd_megatron.types import Completion, Media, Prompt

SHADES = " .:-=+*#%@"
"""Dark to bright, for media drawn in characters."""
LEGEND = ("prompt", "dim"), ("media", "cyan"), ("adapted span", "underline"), ("carries loss", "bold green"), \
         ("environment", "yellow")


def preview(config: RunConfig, count: int, console: Console | None = None) -> None:
    """Print ``count`` prompts per expert with one group of sampled answers each, and a table per domain.

    Every rank runs it; the main rank prints.
    """
    policies = build_policies(config)
    groups, encoder = policies.groups, policies.encoder
    console = console or Console(quiet=not groups.is_main, highlight=False)
    params = sampling_params(config.rollout, encoder)
    console.print(Text.assemble("colours: ", *(part for text, style in LEGEND for part in ((text, style), "  "))))
    table = Table("domain", "prompts", "pass rate", "reward", "parseable", "prompt tokens", "answer tokens",
                  "truncated")
    for domain in config.experts:
        prompts = [policies.source.train(domain, i) for i in range(count)]
        # The backbone answers: fresh experts are the backbone, and it lives on every replica.
        answers = policies.collector.collect(
            [Request(p, None, config.rollout.group_size, params, (0,)) for p in prompts])
        for prompt, group in zip(prompts, answers):
            _show(console, config, encoder, prompt, group)
        table.add_row(domain, str(len(prompts)), *_summary(prompts, [c for g in answers for c in g]))
    console.print(table)


def _show(console: Console, config: RunConfig, encoder: PromptEncoder, prompt: Prompt,
          group: Sequence[Completion]) -> None:
    console.rule(f"{prompt.domain}  {prompt.key}")
    console.print(render_tokens(encoder, prompt, group[0], config.adapter.scope), soft_wrap=True)
    for media in prompt.item.media:
        console.print(draw(media), style="cyan")
    console.print(f"truth: {prompt.item.answer!r}")
    for completion in group:
        parts = "  ".join(f"{name} {value:g}" for name, value in completion.reward_parts.items())
        console.print(f"  {completion.reward:5.2f}  {parts}  extracted {completion.extracted!r}  "
                      f"{len(completion.token_ids)} tokens, {completion.finish}: {completion.text!r}", markup=False)


def render_tokens(encoder: PromptEncoder, prompt: Prompt, completion: Completion, scope: str) -> Text:
    """Prompt and completion token by token, special tokens shown; styles as in ``LEGEND``."""
    text, visual = Text(), set(prompt.visual_index.tolist())
    adapted_from = len(prompt.token_ids) - prompt.header_tokens if scope == "completion" else 0
    for index, token in enumerate(encoder.token_texts(prompt.token_ids.tolist())):
        style = "cyan" if index in visual else "dim"
        text.append(token, f"{style} underline" if index >= adapted_from else style)
    for token, learns in zip(encoder.token_texts(completion.token_ids), completion.loss_mask):
        text.append(token, "bold green underline" if learns else "yellow underline")
    return text


def draw(media: Media, width: int = 32) -> str:
    """An image, or a video's frames side by side, in characters."""
    frames = media.pixels if media.kind == "video" else media.pixels[None]
    step = max(1, frames.shape[2] // width)
    # A character is about twice as high as wide.
    grey = frames[:, ::2 * step, ::step].mean(-1) / 256
    rows = ["  ".join("".join(SHADES[int(v * len(SHADES))] for v in frame[y]) for frame in grey)
            for y in range(grey.shape[1])]
    return "\n".join(rows)


def _summary(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[str]:
    mean = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    share = lambda values: f"{100 * mean(values):.0f} %"  # noqa: E731
    accuracy = [c.reward_parts.get("accuracy", c.reward) for c in completions]
    return [share(accuracy), f"{mean([c.reward for c in completions]):.3f}",
            share([c.extracted is not None for c in completions]),
            f"{mean([len(p.token_ids) for p in prompts]):.0f}",
            f"{mean([len(c.token_ids) for c in completions]):.1f}",
            share([c.finish == "length" for c in completions])]
