"""Names of configuration fields and metrics that the documentation uses exist."""
from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from copd_megatron.config.run import RunConfig
from copd_megatron.config.schema import field_rows
from copd_megatron.metrics.names import METRICS, TIMED_PHASES, find
from copd_megatron.tasks.dataset import DatasetTask

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_ENTRY = re.compile(r"(?<=^experts\.)[<>\w]+|(?<=\.rewards\.)\w+")
"""Names that the user gives."""
FIELDS = {_ENTRY.sub("NAME", row.path) for row in field_rows()}
SECTIONS = {path.split(".")[0] for path in FIELDS if "." in path}
FILES = {"jsonl", "json", "md", "py"}

_CODE = re.compile(r"`([^`\n]+)`")
_FIELD = re.compile(rf"(?<![\w./])((?:{'|'.join(sorted(SECTIONS))})(?:\.\w+)+)")


def _unknown_fields(code: str) -> list[str]:
    """Dotted names in ``code`` that begin with a section and are no field of it."""
    found = []
    for path in _FIELD.findall(code):
        field = _ENTRY.sub("NAME", path)
        free = any(field.startswith(f"{known}.") for known in FIELDS)  # below a plain dict: task_args, weights
        if field not in FIELDS and not free and path.rpartition(".")[2] not in FILES:
            found.append(path)
    return found


def _theirs_and_ours(title: str) -> list[tuple[str, list[str]]]:
    """Rows of a table of docs/coming_from.md: the cell of our names, and the code in it."""
    text = (ROOT / "docs/coming_from.md").read_text()
    table = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[0].lstrip("| ") for line in table.splitlines() if line.startswith("| ")]
    return [(cell, _CODE.findall(cell)) for cell in cells if cell != "ours"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_fields_exist(document):
    text = document.read_text()
    settings = [line for line in text.splitlines() if "--set " in line]
    assert [name for code in [*_CODE.findall(text), *settings] for name in _unknown_fields(code)] == []


def test_unknown_fields_are_found():
    assert _unknown_fields("rlvr.clip_lo=0.1, model.path=x, metrics.jsonl") == ["rlvr.clip_lo"]
    assert _unknown_fields("experts.maths.tasks experts.maths.task_args.path") == ["experts.maths.tasks"]


def test_our_column_of_configuration_names():
    rows = _theirs_and_ours("Configuration")
    arguments = inspect.signature(DatasetTask).parameters
    for cell, codes in rows:
        section = ""
        for code in codes:
            name = re.match(r"\.?\w[.\w]*|", code).group()
            if name.startswith("task_args."):
                assert name.removeprefix("task_args.") in arguments, cell
            elif "." in name:
                section = name.rpartition(".")[0] if not name.startswith(".") else section
                path = section + name if name.startswith(".") else name
                assert path.split(".")[0] in SECTIONS and not _unknown_fields(path), (cell, path)
    assert len(rows) > 40


def test_our_column_of_metric_names():
    patterns = {metric.pattern for metric in METRICS}
    for cell, names in _theirs_and_ours("Metrics"):
        for name in names:
            family = name.removesuffix("...")
            known = name in patterns or any(p.startswith(family) for p in patterns if family != name)
            timed = name in {f"time/{phase}_s" for phase in (*TIMED_PHASES, "step")} and find(name)
            assert known or timed, cell


def test_sections_are_those_of_a_run():
    assert SECTIONS <= set(RunConfig.model_fields)
