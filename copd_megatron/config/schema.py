"""The schema of a run as a flat table: every field with its path, type, default, value and docstring.

``copd config`` prints this table, and error messages name the nearest entry of it.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from copd_megatron.config.run import RunConfig
from copd_megatron.config.section import Section


class _Required:
    """The default of a field that has none."""

    def __repr__(self) -> str:
        return "(required)"


REQUIRED = _Required()

BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
"""Attribute of a pydantic constraint -> how people write it."""


@dataclass(frozen=True)
class FieldRow:
    """One field of a run. Example: ``FieldRow("rlvr.clip_low", "float >= 0", 0.2, 0.2, "Lower ...")``."""

    path: str
    """Dotted, as ``--set`` takes it; entries of a dict that is not filled in read ``<name>``."""
    type: str
    default: Any
    value: Any
    """What the run has; the default where no run is given."""
    doc: str


def section_type(annotation: Any) -> type[Section] | None:
    """The section class of a field, or None if the field is a plain value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def entry_type(annotation: Any) -> type[Section] | None:
    """The section class of the entries of a dict field such as ``experts``, else None."""
    if get_origin(annotation) is dict:
        return section_type(get_args(annotation)[1])
    return None


def field_rows(config: RunConfig | None = None) -> list[FieldRow]:
    """All fields of a run in the order of declaration; without ``config``, of a run with nothing set."""
    return list(_rows(RunConfig, config, ""))


def _rows(section: type[Section], value: Section | None, prefix: str) -> Iterator[FieldRow]:
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        default = REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
        current = default if value is None else getattr(value, name)
        if inner := section_type(field.annotation):
            yield from _rows(inner, None if current is REQUIRED else current, f"{path}.")
        elif inner := entry_type(field.annotation):
            entries = {"<name>": None} if current is REQUIRED else current
            for key, entry in entries.items():
                yield from _rows(inner, entry, f"{path}.{key}.")
        else:
            yield FieldRow(path, type_text(field), default, current, field.description or "")


def type_text(field: FieldInfo) -> str:
    """What a field accepts, for people: ``float >= 0``, ``"hub" | "ring"``, ``float > 1 or null``."""
    bounds = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in BOUNDS.items()
        if hasattr(constraint, name)
    ]
    names = [_annotation_text(part) for part in _alternatives(field.annotation)]
    if bounds:
        names[0] += " " + " and ".join(bounds)
    return " or ".join(names)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _annotation_text(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if annotation is Any:
        return "any value"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{choice}"' for choice in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_annotation_text(arguments[0])}"
        return f"list [{', '.join(_annotation_text(a) for a in arguments)}]"
    if origin is dict:
        return "dict"
    return getattr(annotation, "__name__", str(annotation))


def nearest(path: str, known: Sequence[str]) -> str:
    """The entry of ``known`` that somebody who wrote ``path`` most likely meant.

    The last part of the path counts most: ``lr`` finds ``optimizer.lr``, ``rollout.lr`` too, and a key with more
    words than the entry's is taken for the entry.
    """
    leaf = path.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        return (
            SequenceMatcher(None, leaf, candidate.rpartition(".")[2]).ratio()
            + 0.5 * leaf.startswith(candidate.rpartition(".")[2] + "_")
            + 0.5 * SequenceMatcher(None, path, candidate).ratio()
        )

    return max(known, key=likeness)
