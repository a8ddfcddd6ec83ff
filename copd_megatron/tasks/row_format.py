"""The normal form of a dataset row: a chat whose media have places, a reference answer, a verifier.

``prompt`` (or ``messages``) may name the places itself, by parts {"type": "image"} or by tags ``<image>`` and
``<video>`` in its text; if it names none, the media stand before the text of the last message. A part may also hold
its medium itself: {"type": "image", "image": "cats/3.png"}, {"type": "image_url", "image_url": {"url": ...}}.
"""
from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from copd_megatron.tasks.answer import Verifier, check_reference, parse_verifier
from copd_megatron.types import Message

FIELDS = ("prompt", "messages", "images", "videos", "answer", "verifier")
ROLES = ("system", "user", "assistant", "tool")
FIELD_OF = {"image": "images", "video": "videos"}
"""Kind of a medium -> the field that lists its sources."""
_IN_PLACE = ("image", "video", "path", "url")
"""Keys under which a part holds its medium itself."""
_TAG = re.compile(r"<(image|video)>")


class FieldError(ValueError):
    """A field of a row is wrong; the message reads ``what was given; what is allowed``."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Medium:
    """Where an image or video of a row comes from. Example: ``Medium("image", "cats/3.png")``."""

    kind: str
    """"image" or "video"."""
    source: Any
    """See ``tasks.media``."""

    @property
    def field(self) -> str:
        """The row's field that holds it."""
        return FIELD_OF[self.kind]


@dataclass(frozen=True)
class Question:
    """A row in normal form, media not yet decoded."""

    messages: list[Message]
    media: list[Medium]
    """In the order of their places in ``messages``."""
    answer: Any
    verifier: Verifier
    extra: dict[str, Any]
    """The columns that are no field."""

    def digest(self, seed: int) -> int:
        """64-bit hash of what the model is shown, keyed by the seed."""
        media = [[medium.kind, medium.source] for medium in self.media]
        shown = json.dumps([seed, self.messages, media], sort_keys=True, default=_fingerprint)
        return int.from_bytes(hashlib.sha256(shown.encode()).digest()[:8])


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a file read."""

    columns: Mapping[str, str | None]
    """Field -> column, for the fields whose column has another name; see ``DatasetTask``."""
    verifier: Verifier
    """Of rows that name none."""
    instruction: str = ""
    """Appended to the last message."""

    def column(self, field: str) -> str | None:
        """The column that holds a field; None if it is not read."""
        return self.columns.get(field, field)

    def parse(self, row: Mapping[str, Any]) -> Question:
        """Normal form of a row. Raises FieldError for the first field that is wrong."""
        value = {field: _value_at(row, self.column(field)) for field in FIELDS}
        verifier = self.verifier
        if value["verifier"] is not None:
            try:
                verifier = parse_verifier(value["verifier"])
            except ValueError as error:
                raise FieldError("verifier", str(error)) from error
        if value["answer"] is None:
            raise FieldError("answer", "missing; every row needs one")
        try:
            check_reference(verifier, value["answer"])
        except ValueError as error:
            raise FieldError("answer", str(error)) from error
        messages, media = read_chat(value)
        if self.instruction:
            _append_text(messages[-1], self.instruction)
        fields = {self.column(field) for field in FIELDS}
        extra = {name: content for name, content in row.items() if name not in fields and content is not None}
        return Question(messages, media, value["answer"], verifier, extra)


def read_chat(value: Mapping[str, Any]) -> tuple[list[Message], list[Medium]]:
    """Messages in normal form, and their media in the order of their places.

    Args:
        value: prompt or messages, and images and videos if there are any.

    Raises:
        FieldError: the first field that is wrong.
    """
    sources = {kind: source_list(value.get(field)) for kind, field in FIELD_OF.items()}
    messages = _messages(value.get("prompt"), value.get("messages"), has_media=any(sources.values()))
    return messages, _place_media(messages, sources)


def _value_at(row: Mapping[str, Any], column: str | None) -> Any:
    """The value of a column, "a.b" being b within a; None where there is none."""
    if column is None or column in row:
        return None if column is None else row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def source_list(value: Any) -> list[Any]:
    """A field of media as a list: a single path, bytes or struct stands for itself."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _messages(prompt: Any, messages: Any, *, has_media: bool) -> list[Message]:
    """A new list of checked messages from whichever of the two fields is given."""
    if prompt is not None and messages is not None:
        raise FieldError("messages", "prompt and messages were both given; allowed is one of them")
    if prompt is None and messages is None:
        raise FieldError("prompt", "missing; every row needs a prompt or messages")
    field = "prompt" if messages is None else "messages"
    chat = prompt if messages is None else messages
    if isinstance(chat, str) and field == "prompt":
        chat = [{"role": "user", "content": chat}]
    if not isinstance(chat, list) or not chat:
        raise FieldError(field, f"{str(chat)[:60]!r} was given; allowed is a text (prompt) or a list of "
                                "messages")
    checked = [_message(given, f"message {number}", field, has_media) for number, given in enumerate(chat)]
    if checked[-1]["role"] not in ("user", "tool"):
        raise FieldError(field, f"the last message is the {checked[-1]['role']}'s; allowed is the user's: "
                                "the assistant's turn is what the experts write")
    if not has_media and not any(_texts(message).strip() for message in checked):
        raise FieldError(field, "empty; it needs a text")
    return checked


def _message(message: Any, where: str, field: str, split_tags: bool) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise FieldError(field, f"{where} is {str(message)[:60]!r}; allowed is {{'role':, 'content':}} with "
                                f"a role of {list(ROLES)}")
    content = message.get("content")
    if isinstance(content, str):
        if not (split_tags and _TAG.search(content)):
            return {"role": message["role"], "content": content}
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise FieldError(field, f"{where} has the content {str(content)[:60]!r}; allowed is a text or a list "
                                "of parts")
    parts = [part for given in content for part in _parts(given, where, field, split_tags)]
    return {"role": message["role"], "content": parts}


def _parts(part: Any, where: str, field: str, split_tags: bool) -> list[dict[str, Any]]:
    """A content part in normal form, a medium of its own as "source"; a text with tags becomes several."""
    given = dict(part) if isinstance(part, Mapping) else {}
    # Parquet fills structs with null.
    given = {key: value for key, value in given.items() if value is not None}
    kind = given.pop("type", None)
    if kind in ("image_url", "video_url"):
        kind, given = kind.removesuffix("_url"), _url_source(given.get(kind))
    if kind in FIELD_OF:
        if not given:
            return [{"type": kind}]
        if sum(key in given for key in _IN_PLACE) != 1:
            raise FieldError(field, f"{where} has the part {str(part)[:60]!r}; allowed is {{'type': '{kind}'}} with "
                                    f"the {kind} in field '{FIELD_OF[kind]}', or one of {list(_IN_PLACE)} in it")
        return [{"type": kind, "source": given}]
    if kind != "text" or not isinstance(given.get("text"), str):
        raise FieldError(field, f"{where} has the part {str(part)[:60]!r}; allowed are "
                                "{'type': 'text', 'text':}, {'type': 'image'} and {'type': 'video'}")
    if not split_tags:
        return [{"type": "text", "text": given["text"]}]
    pieces = _TAG.split(given["text"])  # text, kind, text, kind, ..., text
    return [{"type": "text", "text": piece} if place % 2 == 0 else {"type": piece}
            for place, piece in enumerate(pieces) if piece]


def _url_source(url: Any) -> dict[str, Any]:
    """OpenAI's {"url": address}, which may be the address alone."""
    return {"url": url.get("url") if isinstance(url, Mapping) else url}


def _texts(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _place_media(messages: list[Message], sources: Mapping[str, list[Any]]) -> list[Medium]:
    """Give every medium its place, in ``messages`` if these name none; returns them in the order of the
    places."""
    places = [part for message in messages if not isinstance(message["content"], str)
              for part in message["content"] if part["type"] in FIELD_OF]
    if not places and any(sources.values()):
        places = [{"type": kind} for kind, given in sources.items() for _ in given]
        text = messages[-1]["content"]
        parts = [{"type": "text", "text": text}] if isinstance(text, str) else text
        messages[-1]["content"] = places + parts
    for kind, given in sources.items():
        bare = sum(part == {"type": kind} for part in places)
        if bare != len(given):
            raise FieldError(FIELD_OF[kind], f"{len(given)} given, but the text has places for "
                                             f"{bare}; allowed is one for each")
    waiting = {kind: iter(given) for kind, given in sources.items()}
    return [Medium(part["type"], part.pop("source") if "source" in part else next(waiting[part["type"]]))
            for part in places]


def _append_text(message: Message, text: str) -> None:
    """On a line of its own."""
    if isinstance(message["content"], str):
        message["content"] = f"{message['content']}\n{text}"
    else:
        message["content"] = [*message["content"], {"type": "text", "text": f"\n{text}"}]


def _fingerprint(value: Any) -> str:
    """Stands for bytes in JSON."""
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()
