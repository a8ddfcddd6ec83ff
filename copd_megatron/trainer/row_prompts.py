"""Rows of ``copd score`` and ``copd generate`` as prompts and completions of the backbone at hand.

A row has "prompt" (a text, tokenised as it stands, no special tokens added; media take the family's own placeholders
in it) or "messages" (a chat, rendered by the chat template with the generation header), "images" and "videos" (paths
that start at the file's folder, and whatever else ``tasks.media`` reads), and to be scored "completion", tokenised by
itself.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.tasks.frames import MediaRules
from copd_megatron.tasks.media import load
from copd_megatron.tasks.row_format import FIELD_OF, FieldError, Medium, read_chat, source_list
from copd_megatron.types import Prompt, TaskItem, UserError

DOMAIN = "rows"
"""``Prompt.domain`` of all of them."""
SHOWN = ("prompt", "messages", *FIELD_OF.values())
"""Fields that the model is shown before it answers."""


@dataclass(frozen=True)
class InputRow:
    """One line of a file. Example: ``InputRow(0, {"prompt": "2+2=", "completion": "4"})``."""

    number: int
    """Of the rows of the file, from 0."""
    content: Any
    """The JSON value; None where the line holds none."""
    error: str = ""
    """Why it holds none."""

    def name(self) -> dict[str, Any]:
        """What the row's answer carries along: its "id", if it has one."""
        has_one = isinstance(self.content, Mapping) and "id" in self.content
        return {"id": self.content["id"]} if has_one else {}

    def prompt_key(self) -> str:
        """Equal for rows that show the model the same."""
        shown = self.content if isinstance(self.content, Mapping) else {}
        return json.dumps([shown.get(field) for field in SHOWN], sort_keys=True)


@dataclass(eq=False)
class RowPrompts:
    """Encodes rows; a prompt that several of them share is encoded once between two calls of ``forget``."""

    encoder: PromptEncoder
    folder: Path
    """Of the file: relative media paths start there."""
    invocation: tuple[int, ...] | None = None
    """Tokens that every prompt must end in, see ``SinglePolicy.invocation``."""
    rules: MediaRules = MediaRules()
    _known: dict[str, Prompt] = field(default_factory=dict)

    def forget(self) -> None:
        """Let go of the prompts that are held."""
        self._known.clear()

    def prompt(self, row: InputRow) -> Prompt:
        """What the model is shown. Raises FieldError or UserError for a row that is wrong."""
        key = row.prompt_key()
        if key not in self._known:
            self._known[key] = self._encode(row)
        return self._known[key]

    def completion(self, row: InputRow, prompt: Prompt) -> list[int]:
        """Token ids of the row's completion. Raises FieldError for a row that is wrong."""
        text = row.content.get("completion")
        if not isinstance(text, str):
            given = "missing" if text is None else f"{str(text)[:60]!r} was given"
            raise FieldError("completion", f"{given}; every row needs a text")
        token_ids = self.encoder.tokenize(text)
        if self.invocation and _starts_again([*prompt.token_ids.tolist(), *token_ids], self.invocation,
                                             len(prompt.token_ids)):
            raise FieldError("completion", f"it holds the invocation tokens {list(self.invocation)}; an activated LoRA "
                                           "would begin there anew; allowed is a text without them")
        self.check_length(prompt, len(token_ids))
        return token_ids

    def check_length(self, prompt: Prompt, tokens: int) -> None:
        """Raise UserError if the backbone cannot read ``tokens`` more tokens."""
        self.encoder.spec.rope.check_length(prompt.next_position + tokens, "it")

    def _encode(self, row: InputRow) -> Prompt:
        if row.error:
            raise ValueError(row.error)
        if not isinstance(row.content, Mapping):
            raise ValueError(f"a JSON {type(row.content).__name__} was given; allowed is an object")
        text, key = row.content.get("prompt"), f"row {row.number + 1}"
        if isinstance(text, str) and row.content.get("messages") is None:
            media = self._in_order(text, row.content)
            item = TaskItem(key, [], self._load(media), None)
            prompt = self.encoder.encode_text(item, text, DOMAIN)
        else:
            messages, media = read_chat(row.content)
            prompt = self.encoder.encode(TaskItem(key, messages, self._load(media), None), DOMAIN)
        header = 0
        if self.invocation:
            header = len(self.invocation)
            if tuple(prompt.token_ids[-header:]) != self.invocation:
                raise FieldError("prompt", f"it ends in the tokens {prompt.token_ids[-header:].tolist()}; under an "
                                           f"activated LoRA a prompt ends in its invocation tokens "
                                           f"{list(self.invocation)}, {self.encoder.decode(self.invocation, False)!r}")
        # Ranks tell each other prompts: pixels stay here. The key feeds the noise, as the row's number does.
        return replace(prompt, key=DOMAIN, header_tokens=header, item=None)

    def _in_order(self, text: str, content: Mapping[str, Any]) -> list[Medium]:
        """The media of a text row in the order of their placeholders."""
        waiting = {kind: source_list(content.get(field)) for kind, field in FIELD_OF.items()}
        order = self.encoder.placeholders(text)
        if not self.encoder.spec.is_visual:
            return [Medium(kind, source) for kind, sources in waiting.items() for source in sources]
        for kind, sources in waiting.items():
            if order.count(kind) != len(sources):
                raise FieldError(FIELD_OF[kind], f"{len(sources)} given, but the prompt has {order.count(kind)} of the "
                                                 f"model's placeholders; allowed is one for each, or messages")
        return [Medium(kind, waiting[kind].pop(0)) for kind in order]

    def _load(self, media: Sequence[Medium]) -> tuple:
        loaded = []
        for medium in media:
            try:
                loaded.append(load(medium.kind, medium.source, self.folder, self.rules))
            except ValueError as error:
                raise FieldError(medium.field, str(error)) from error
        return tuple(loaded)


def error_row(error: Exception) -> dict[str, str]:
    """What stands in the output for a row that is wrong."""
    if isinstance(error, FieldError):
        return {"error": f"{error.field}: {error}"}
    known = isinstance(error, (UserError, ValueError))
    return {"error": str(error) if known else f"{type(error).__name__}: {error}"}


def _starts_again(token_ids: Sequence[int], pattern: Sequence[int], length: int) -> bool:
    """Whether ``pattern`` occurs after its occurrence at the end of the first ``length`` tokens."""
    ids, size = np.asarray(token_ids), len(pattern)
    return any(np.array_equal(ids[start:start + size], pattern)
               for start in range(length - size + 1, len(ids) - size + 1))
