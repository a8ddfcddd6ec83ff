"""Our recipe's questions in the peers' columns: the same rows, instruction, split and reference answers.

    python benchmarks/peers/export.py examples/qwen3_vl_4b_one_node.py --out data/peers

writes, for each expert whose task is ``DatasetTask``:

    verl/NAME_{train,test}.parquet   data_source, prompt, images, videos, reward_model, extra_info; media as file URIs
    nemo_rl/NAME_{train,test}.jsonl  input, output (``ResponseDataset``); experts without media only

Held-out rows are the first ``evaluation.final_prompts`` of ours, in our order. The verifier is written to
``extra_info.verifier``; ``verl/reward.py`` grades with it, so that both sides count the same answers as right.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from copd_megatron.config.loading import load_recipe  # noqa: E402
from copd_megatron.config.tasks import ExpertConfig  # noqa: E402
from copd_megatron.tasks.answer import parse_verifier  # noqa: E402
from copd_megatron.tasks.dataset import DatasetTask  # noqa: E402
from copd_megatron.tasks.loading import build_task  # noqa: E402
from copd_megatron.tasks.row_format import FieldError, Question, RowFormat  # noqa: E402
from copd_megatron.tasks.rows import read_rows  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

TAGS = {"image": "<image>", "video": "<video>"}
"""How verl marks the place of a medium in a text."""


def questions(name: str, expert: ExpertConfig, split: str, most: int | None) -> Iterator[tuple[Question, Path]]:
    """Questions of a split in our order, media as their files' paths, and the folder that these start at.

    Raises:
        UserError: the expert's task is no ``DatasetTask``, or its data are wrong.
    """
    task = build_task(expert, name)
    if not isinstance(task, DatasetTask):
        raise UserError(f"experts.{name}.task: {type(task).__name__}; only the rows of a DatasetTask can be exported; "
                        "write its questions to a JSONL file first")
    arguments = expert.task_args
    form = RowFormat(dict(arguments.get("columns") or {}), parse_verifier(arguments.get("verifier", "math")),
                     arguments.get("instruction", ""))
    opened: dict[Path, tuple[Any, dict[int, int]]] = {}
    for index in range(min(task.size(split), most or task.size(split))):
        path, number = task.source_row(split, index)
        if path not in opened:
            rows = read_rows(path, f"experts.{name}.task_args", skip=True)
            opened[path] = rows, {rows.number(place): place for place in range(len(rows))}
        rows, place_of = opened[path]
        try:
            yield form.parse(rows[place_of[number]]), path.parent
        except FieldError as error:
            raise UserError(f"experts.{name}: {path} row {number}, {error.field}: {error}; correct the row") from error


def verl_row(name: str, split: str, index: int, question: Question, folder: Path) -> dict[str, Any]:
    """A row of verl's ``RLHFDataset``."""
    sources = {kind: [_located(m.source, folder) for m in question.media if m.kind == kind] for kind in TAGS}
    verifier = {"name": question.verifier.name, **question.verifier.options}
    return {"data_source": name, "prompt": [{"role": m["role"], "content": text_of(m["content"])}
                                            for m in question.messages],
            "images": [{"image": source} for source in sources["image"]],
            "videos": [{"video": source} for source in sources["video"]],
            "ability": name, "reward_model": {"style": "rule", "ground_truth": json.dumps(question.answer)},
            "extra_info": {"split": split, "index": index, "verifier": json.dumps(verifier)}}


def text_of(content: Any) -> str:
    """A message's text with tags at the places of its media."""
    if isinstance(content, str):
        return content
    return "".join(TAGS.get(part["type"]) or part["text"] for part in content)


def _located(source: Any, folder: Path) -> str:
    if not isinstance(source, str) or source.startswith("data:"):
        raise UserError(f"export: a medium is given as {type(source).__name__} or as a data URI; allowed are paths; "
                        "write the media to files")
    return (folder / source).resolve().as_uri()


def write_verl(target: Path, rows: list[dict[str, Any]]) -> None:
    """Parquet, whole or not at all. Columns that no row fills are left out: verl would look for media in them."""
    import pyarrow
    import pyarrow.parquet as pq

    for column in ("images", "videos"):
        if not any(row[column] for row in rows):
            rows = [{key: value for key, value in row.items() if key != column} for row in rows]
    partial = target.with_name(target.name + ".tmp")
    pq.write_table(pyarrow.Table.from_pylist(rows), partial)
    os.replace(partial, target)


def write_nemo_rl(target: Path, rows: list[dict[str, Any]]) -> None:
    """JSONL, whole or not at all."""
    partial = target.with_name(target.name + ".tmp")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, target)


def export(recipe: Path, out: Path) -> list[str]:
    """Write all files; what was written, a line each."""
    config, lines = load_recipe(recipe), []
    for name, expert in config.experts.items():
        for split, ours, most in (("train", "train", None), ("test", "held_out", config.evaluation.final_prompts)):
            found = list(questions(name, expert, ours, most))
            target = out / "verl" / f"{name}_{split}.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_verl(target, [verl_row(name, split, i, q, folder) for i, (q, folder) in enumerate(found)])
            lines.append(f"{target}: {len(found)} rows")
            if any(question.media for question, _ in found):
                continue
            target = out / "nemo_rl" / f"{name}_{split}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_nemo_rl(target, [{"input": text_of(q.messages[-1]["content"]), "output": str(q.answer)}
                                   for q, _ in found])
            lines.append(f"{target}: {len(found)} rows")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="our recipe (.py)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        print("\n".join(export(options.recipe, options.out)))
    except UserError as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
