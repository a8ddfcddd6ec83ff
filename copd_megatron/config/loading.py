"""From a recipe file and ``--set`` overrides to a resolved RunConfig, and from that to JSON and back.

A recipe is a Python file with a function ``recipe() -> RunConfig``. Every mistake in it is a UserError,
raised before any weight is loaded.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from copd_megatron.config.errors import explain
from copd_megatron.config.overrides import overridden_tree
from copd_megatron.config.run import RunConfig
from copd_megatron.config.section import Section
from copd_megatron.types import Edge, UserError

FUNCTION = "recipe"
"""Name of the function that a recipe file defines."""

RECIPE_MARK = "__copd_recipe__"
"""Set on the modules of recipes: a later recipe of the same name may take their place."""

NAMELESS = re.compile(r"<\S+:\S+ object>")
"""How `to_json` writes an object that cannot be read back."""


def load_recipe(path: str | Path) -> RunConfig:
    """Run a recipe file and return its configuration.

    The file's folder goes first on ``sys.path``, as for a script, so that a recipe imports its neighbours and
    names of the form "neighbour:Name" resolve. Relative ``model.path``, ``rlvr.kl_reference``,
    ``experts.*.init_from`` and ``exchange.frozen_teachers`` are taken from that folder.

    Raises:
        UserError: the file is missing, fails, or has no ``recipe()`` that returns a valid RunConfig.
    """
    file = Path(path)
    if file.suffix != ".py" or not file.is_file():
        reason = (
            "is a folder" if file.is_dir() else "is no Python file" if file.exists() else "does not exist"
        )
        raise UserError(
            f"recipe: {path} {reason}; a Python file with a function {FUNCTION}() -> RunConfig is needed; "
            "examples/quickstart.py is one"
        )
    file = file.resolve()
    try:
        module = _import_file(file)
        build = getattr(module, FUNCTION, None)
        if not callable(build):
            raise UserError(
                f"recipe: {path} has no function {FUNCTION}(); it must return a RunConfig; "
                f"define `def {FUNCTION}() -> RunConfig:`"
            )
        config = build()
    except ValidationError as error:
        raise explain(error) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"recipe: {_place(error, file)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise UserError(
            f"recipe: {path}: {FUNCTION}() returned {type(config).__name__}; it must return a RunConfig"
        )
    conflict = config.conflict()  # once more: a recipe may have changed a section of a finished run
    if conflict:
        raise UserError(conflict)
    return _with_absolute_paths(config, file.parent)


def _import_file(file: Path) -> ModuleType:
    """Execute ``file`` afresh as a top-level module of its own name."""
    name = file.stem
    if "." in name:
        raise UserError(f"recipe: {file.name}: a dot before .py; a plain module name; rename the file")
    loaded = sys.modules.get(name)
    if loaded is not None:
        # Another recipe may have imported this one.
        taken = not hasattr(loaded, RECIPE_MARK) and getattr(loaded, "__file__", None) != str(file)
    else:
        spec = importlib.util.find_spec(name)
        taken = spec is not None and spec.origin != str(file)
    if taken:
        raise UserError(
            f"recipe: {file.name} hides the module {name!r}; any other name will do; rename the file"
        )
    add_import_folder(file.parent)
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    setattr(module, RECIPE_MARK, True)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def add_import_folder(folder: str | Path) -> None:
    """Put ``folder`` first on ``sys.path``, once: modules in it become importable by their plain names."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _place(error: Exception, file: Path) -> str:
    """Innermost line of the recipe, or of a file beside it, that led to ``error``."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).parent == file.parent
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else str(file)


def _with_absolute_paths(config: RunConfig, folder: Path) -> RunConfig:
    model = config.model.model_copy(update={"path": _absolute(config.model.path, folder)})
    rlvr = config.rlvr
    if rlvr.kl_reference != "backbone":
        rlvr = rlvr.model_copy(update={"kl_reference": _absolute(rlvr.kl_reference, folder)})
    frozen = {name: _absolute(path, folder) for name, path in config.exchange.frozen_teachers.items()}
    exchange = config.exchange.model_copy(update={"frozen_teachers": frozen})
    experts = {
        name: expert.model_copy(update={"init_from": _absolute(expert.init_from, folder)})
        if expert.init_from
        else expert
        for name, expert in config.experts.items()
    }
    return config.model_copy(
        update={"model": model, "rlvr": rlvr, "exchange": exchange, "experts": experts}
    )


def _absolute(path: str, folder: Path) -> str:
    return str((folder / Path(path).expanduser()).resolve())


def apply_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A new run with each "section.field=value" applied in order; ``config`` itself is left as it is.

    Values are JSON where they parse as JSON, also bare lists ([q_proj,v_proj]) and None, True, False;
    otherwise, and where the field wants text, they are text. Entries of dicts are reached by name
    (``experts.text.task_args.level=2``). A relative ``model.path`` is taken from the current folder.

    Raises:
        UserError: no "=", an unknown key (the nearest one is named), a value the field does not accept.
    """
    if not overrides:
        return config
    tree = overridden_tree(config, overrides)
    for section, field in (("model", "path"), ("rlvr", "kl_reference")):
        given = tree[section].get(field) if isinstance(tree[section], dict) else None
        if (
            isinstance(given, str)
            and given != "backbone"
            and given != getattr(getattr(config, section), field)
        ):
            tree[section][field] = _absolute(given, Path.cwd())
    frozen = tree["exchange"].get("frozen_teachers") if isinstance(tree["exchange"], dict) else None
    for name, given in frozen.items() if isinstance(frozen, dict) else ():
        if isinstance(given, str) and given != config.exchange.frozen_teachers.get(name):
            frozen[name] = _absolute(given, Path.cwd())
    for name, expert in tree["experts"].items() if isinstance(tree["experts"], dict) else ():
        given = expert.get("init_from") if isinstance(expert, dict) else None
        if isinstance(given, str) and (name not in config.experts or given != config.experts[name].init_from):
            expert["init_from"] = _absolute(given, Path.cwd())
    try:
        return type(config).model_validate(tree)
    except ValidationError as error:
        raise explain(error, config) from error


def to_json(config: RunConfig) -> str:
    """The resolved run as indented JSON; functions and classes as "pkg.module:qualname".

    Objects that were built in the recipe (a Task instance) have no name: they appear as "<pkg.module:Class
    object>" and such a file can be read by people only (`load_config` refuses it).
    """
    return json.dumps(_plain(config), indent=2) + "\n"


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Section):
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Edge):
        return asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(entry) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        return f"{value.__module__}:{value.__qualname__}"
    return f"<{type(value).__module__}:{type(value).__qualname__} object>"


def load_config(file: str | Path) -> RunConfig:
    """Read a run back from the JSON that `to_json` wrote.

    Raises:
        UserError: the file is missing or damaged, or holds an object that only its recipe can build.
    """
    path = Path(file)
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"config: {path} does not exist; a run folder holds config.json; check the folder"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"config: {path} is no JSON (line {error.lineno}); it is written by `copd train`; "
            "name the recipe instead"
        ) from error
    for key, nameless in _nameless(tree, ""):
        raise UserError(
            f'{key}: {path} only says {nameless}; a callable or "pkg.module:Name" can be read back; '
            "name the recipe instead"
        )
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error) from error


def _nameless(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Keys at which `to_json` met an object without a name."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _nameless(entry, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _nameless(entry, f"{key}[{index}]")
    elif isinstance(value, str) and NAMELESS.fullmatch(value):
        yield key, value
