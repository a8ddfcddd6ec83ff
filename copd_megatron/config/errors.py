"""Pydantic's validation errors as the project's one line: what was given; what is allowed; what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from copd_megatron.config.run import RunConfig
from copd_megatron.config.schema import entry_type, field_rows, nearest, section_type, type_text
from copd_megatron.config.section import Section
from copd_megatron.types import UserError

GIVEN_LENGTH = 80
"""Longer values are cut in messages."""


def explain(error: ValidationError, config: RunConfig | None = None) -> UserError:
    """The first problem of ``error`` as a UserError, and how many more there are.

    ``error`` may come from RunConfig or from any of its sections, as when a recipe builds one by itself.
    ``config`` is the run that was being changed, if there was one: its experts are then known names.
    """
    # A mistyped name is both unknown and missing; the unknown one says what happened.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    origin = _origin(error.title)
    if origin is None:  # a model of the recipe's own
        return UserError(f"{error.title}: {'.'.join(map(str, problems[0]['loc']))}: {problems[0]['msg']}")
    section, prefix = origin
    message = _message(problems[0], section, prefix, config)
    if len(problems) > 1:
        message += f" (and {len(problems) - 1} more)"
    return UserError(message)


def unknown_key(path: str, config: RunConfig | None = None) -> UserError:
    """The error for a key that no section has; names the nearest one that exists."""
    known = [row.path for row in field_rows(config)]
    return UserError(f"{path}: no such key; nearest: {nearest(path, known)}; `copd config` lists all keys")


def _origin(title: str) -> tuple[type[Section], str] | None:
    """The section class called ``title`` and its path in a run: "RlvrConfig" -> (RlvrConfig, "rlvr.")."""
    for section, prefix in _sections(RunConfig, ""):
        if section.__name__ == title:
            return section, prefix
    return None


def _sections(section: type[Section], prefix: str) -> Iterator[tuple[type[Section], str]]:
    yield section, prefix
    for name, field in section.model_fields.items():
        if inner := section_type(field.annotation):
            yield from _sections(inner, f"{prefix}{name}.")
        elif inner := entry_type(field.annotation):
            yield from _sections(inner, f"{prefix}{name}.<name>.")


def _message(problem: dict[str, Any], section: type[Section], prefix: str, config: RunConfig | None) -> str:
    location = [part for part in problem["loc"] if part != "[key]"]
    path, field = _follow(section, location, prefix)
    if problem["type"] == "extra_forbidden":
        return str(unknown_key(path, config))
    if problem["type"] == "value_error":  # our own validators write the whole message
        text = str(problem["ctx"]["error"])
        return f"{path}: {text}" if location else text
    if problem["type"] == "missing":
        doc = field.description if field is not None and field.description else "see `copd config`"
        return f"{path}: not given; required; set it: {doc}"
    given = _shorten(repr(problem["input"]))
    if field is None or section_type(field.annotation):
        return f"{path}: {given} given; this is a section with fields; set its fields (see `copd config`)"
    message = f"{path}: {given} given; allowed: {type_text(field)}"
    if field.is_required():
        return message
    return f"{message}; the default is {_shorten(repr(field.get_default(call_default_factory=True)))}"


def _follow(
    section: type[Section], location: Sequence[int | str], prefix: str
) -> tuple[str, FieldInfo | None]:
    """Path and field that pydantic's location names, without what pydantic adds inside a field."""
    path, field = prefix.rstrip("."), None
    inside: type[Section] | None = section
    entries: type[Section] | None = None
    for part in location:
        if inside is not None:
            path = f"{path}.{part}" if path else str(part)
            field = inside.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
            inside, entries = section_type(annotation), entry_type(annotation)
        elif entries is not None:
            path = f"{path}.{part}"
            inside, entries, field = entries, None, None
        elif isinstance(part, int):
            path = f"{path}[{part}]"
    return path or "config", field


def _shorten(text: str) -> str:
    return text if len(text) <= GIVEN_LENGTH else text[: GIVEN_LENGTH - 3] + "..."
