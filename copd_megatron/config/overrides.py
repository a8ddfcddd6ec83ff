"""``--set section.field=value``: typed changes of a resolved run, laid over it as a tree and validated once.

All overrides are laid before validation, so that two fields that only fit together can be set in any order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from copd_megatron.config.errors import unknown_key
from copd_megatron.config.run import RunConfig
from copd_megatron.config.schema import entry_type, nearest, section_type
from copd_megatron.config.section import Section
from copd_megatron.types import UserError

WORDS = {"None": None, "True": True, "False": False}
"""Python's spellings, accepted beside JSON's."""

BARE_WORD = re.compile(r'[^\[\]{},:\s"]+')
"""One element of a list or dict written without quotes, as shells eat quotes: [q_proj,v_proj]."""


def overridden_tree(config: RunConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """``config`` as nested dicts with the overrides laid over it; other objects stay themselves."""
    tree = _as_tree(config)
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not path:
            raise UserError(
                f"--set {override}: no key or no '='; allowed: section.field=value; "
                "write e.g. --set optimizer.lr=1e-4"
            )
        _lay(tree, type(config), path.split("."), path, text.strip(), config)
    return tree


def _as_tree(section: Section) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if section_type(field.annotation):
            tree[name] = _as_tree(value)
        elif entry_type(field.annotation):
            tree[name] = {key: _as_tree(entry) for key, entry in value.items()}
        else:
            tree[name] = dict(value) if isinstance(value, dict) else value
    return tree


def _lay(
    tree: dict[str, Any], section: type[Section], keys: Sequence[str], path: str, text: str, config: RunConfig
) -> None:
    """Set the value at ``keys`` below a section's tree."""
    name, rest = keys[0], keys[1:]
    whole = path.removesuffix("".join(f".{key}" for key in rest))
    field = section.model_fields.get(name)
    if field is None:
        raise unknown_key(whole, config)
    if inner := section_type(field.annotation):
        if not rest:
            tree[name] = parse_value(text, field)
        else:
            _lay(tree[name], inner, rest, path, text, config)
    elif inner := entry_type(field.annotation):
        if not rest:
            tree[name] = parse_value(text, field)
        elif len(rest) == 1:
            tree[name][rest[0]] = parse_value(text, None)
        else:
            entry = _known_entry(tree[name], rest[0], path)
            _lay(entry, inner, rest[1:], path, text, config)
    elif not rest:
        tree[name] = parse_value(text, field)
    elif get_origin(field.annotation) is dict:
        _lay_free(tree[name], rest, path, text)
    else:
        raise UserError(f"{path}: {whole} is a single value; it has no parts; set it as a whole")


def _known_entry(entries: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    """The entry of a dict of sections, e.g. one expert; its fields can be set only when it exists."""
    if key not in entries:
        raise UserError(
            f"{path}: no entry {key!r}; there are {', '.join(entries)}; "
            f"nearest: {nearest(key, list(entries))}"
        )
    if not isinstance(entries[key], dict):
        raise UserError(f"{path}: {key!r} was set to a single value before; set its fields only")
    return entries[key]


def _lay_free(tree: dict[str, Any], keys: Sequence[str], path: str, text: str) -> None:
    """Set a value in a dict without a schema (``task_args``), making nested dicts on the way."""
    for key in keys[:-1]:
        inner = tree.get(key, {})
        if not isinstance(inner, dict):
            raise UserError(f"{path}: {key!r} is {inner!r}; it has no parts; set it as a whole")
        tree[key] = dict(inner)
        tree = tree[key]
    tree[keys[-1]] = parse_value(text, None)


def parse_value(text: str, field: FieldInfo | None) -> Any:
    """The value that ``text`` stands for in ``field``; None is a place without a schema.

    Example: "1e-4" -> 1e-4; "[a,b]" -> ["a", "b"]; "2026" -> 2026 for a number, "2026" for a text field.
    """
    value = _parse(text)
    if field is not None and not _accepts(field, value) and _accepts(field, text):
        return text
    return value


def _parse(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    if text[:1] in "[{" and '"' not in text:
        try:
            return json.loads(BARE_WORD.sub(lambda word: json.dumps(_parse(word[0])), text))
        except json.JSONDecodeError:
            pass
    return text


def _accepts(field: FieldInfo, value: Any) -> bool:
    try:
        TypeAdapter(Annotated[field.annotation, field]).validate_python(value)
    except ValidationError:
        return False
    return True
