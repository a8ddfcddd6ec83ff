"""``copd preview``: what training would see: rendered prompts, sampled answers and how they are graded."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
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
MOST_FRAMES, MOST_COLUMNS = 6, 32
"""Frames of a video that are drawn, and characters across an image or frame."""
VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7f: 0x2421}
"""Control characters as their pictures: what a model says must not steer the terminal."""
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
    table = Table("domain", "prompts", "pass", "reward", "parsed", "prompt len", "answer len", "cut",
                  caption="means over all answers; lengths in tokens", caption_justify="left")
    for domain in config.experts:
        prompts = [policies.source.train(domain, i) for i in range(count)]
        # The backbone answers: fresh experts are the backbone, and it lives on every replica.
        answers = policies.collector.collect(
            [Request(p, None, config.rollout.group_size, params, (0,)) for p in prompts])
        for prompt, group in zip(prompts, answers):
            _show(console, config, encoder, prompt, group)
        table.add_row(domain, str(len(prompts)), *_summary(prompts, [c for g in answers for c in g]))
    console.print(table)
    groups.destroy()


def _show(console: Console, config: RunConfig, encoder: PromptEncoder, prompt: Prompt,
          group: Sequence[Completion]) -> None:
    console.rule(f"{prompt.domain}  {prompt.key}")
    console.print(render_tokens(encoder, prompt, group[0], config.adapter.scope), soft_wrap=True)
    for media in prompt.item.media:
        console.print(draw(media, console.width), end="")
    console.print(f"truth: {prompt.item.answer!r}")
    for completion in group:
        parts = "  ".join(f"{name} {value:g}" for name, value in completion.reward_parts.items())
        console.print(f"  {completion.reward:5.2f}  {parts}  extracted {completion.extracted!r}  "
                      f"{len(completion.token_ids)} tokens, {completion.finish}: {completion.text!r}", markup=False)


def render_tokens(encoder: PromptEncoder, prompt: Prompt, completion: Completion, scope: str) -> Text:
    """Prompt and completion token by token, special tokens shown, runs of visual tokens as "token x count"; styles
    as in ``LEGEND``."""
    text, ids = Text(), prompt.token_ids.tolist()
    visual = set(prompt.visual_index.tolist())
    adapted_from = len(ids) - prompt.header_tokens if scope == "completion" else 0
    shown = encoder.token_texts(ids)
    # A picture is hundreds of equal tokens.
    for (is_visual, adapted, _), run in groupby(
            range(len(ids)), key=lambda i: (i in visual, i >= adapted_from, -1 if i in visual else i)):
        places = list(run)
        times = f" x {len(places)}" if is_visual else ""
        style = ("cyan" if is_visual else "dim") + (" underline" if adapted else "")
        text.append(shown[places[0]].translate(VISIBLE) + times, style)
    for token, learns in zip(encoder.token_texts(completion.token_ids), completion.loss_mask):
        text.append(token.translate(VISIBLE), "bold green underline" if learns else "yellow underline")
    return text


def draw(media: Media, width: int = 80) -> Text:
    """An image, or up to ``MOST_FRAMES`` frames of a video side by side, in coloured characters."""
    frames = media.pixels if media.kind == "video" else media.pixels[None]
    frames = frames[np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int)]
    columns = max(1, min(frames.shape[2], MOST_COLUMNS, (width + 2) // len(frames) - 2))
    # A character is about twice as high as wide.
    lines = max(1, round(frames.shape[1] / frames.shape[2] * columns / 2))
    down, across = (np.arange(count) * size // count for count, size in zip((lines, columns), frames.shape[1:3]))
    text = Text()
    for line in frames[:, down][:, :, across].swapaxes(0, 1):
        for frame in line:
            for red, green, blue in frame.tolist():
                shade = SHADES[(red + green + blue) * len(SHADES) // (3 * 256)]
                text.append(shade, f"rgb({red},{green},{blue})")
            text.append("  ")
        text.append("\n")
    return text


def _summary(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[str]:
    mean = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    share = lambda values: f"{100 * mean(values):.0f} %"  # noqa: E731
    accuracy = [c.reward_parts.get("accuracy", c.reward) for c in completions]
    return [share(accuracy), f"{mean([c.reward for c in completions]):.3f}",
            share([c.extracted is not None for c in completions]),
            f"{mean([len(p.token_ids) for p in prompts]):.0f}",
            f"{mean([len(c.token_ids) for c in completions]):.1f}",
            share([c.finish == "length" for c in completions])]
