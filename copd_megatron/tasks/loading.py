"""From what a recipe says to objects: tasks and functions given directly, as callables, or as
"pkg.module:Name"."""
from __future__ import annotations

import inspect
from typing import Any

from copd_megatron.config.reference import resolve_object
from copd_megatron.config.tasks import ExpertConfig
from copd_megatron.tasks.base import Task
from copd_megatron.types import UserError

_MEMBERS = ("size", "item", "verify", "extract")


def build_task(config: ExpertConfig, name: str) -> Task:
    """The task of expert ``name``: an object as it is; a class, function or reference to one is called with
    ``task_args``.

    Raises:
        UserError: the reference does not resolve, ``task_args`` do not fit, what came out is no task, or it
            has no training question. What the callable itself raises passes through.
    """
    where = f"experts.{name}.task"
    task = resolve_object(config.task, where)
    # A class has the members of a task, so only an instance may pass for one.
    if inspect.isclass(task) or (callable(task) and not isinstance(task, Task)):
        task = _call(task, config.task_args, name)
    elif config.task_args:
        raise UserError(f"experts.{name}.task_args: {sorted(config.task_args)} was given; {where} is a "
                        "finished object, which takes no arguments; remove them, or give the class as task")
    missing = [member for member in _MEMBERS if not callable(getattr(task, member, None))]
    if missing:
        raise UserError(f"{where}: a {type(task).__name__} was given; a task has the methods "
                        f"{list(_MEMBERS)}; add {missing} (see copd_megatron/tasks/base.py)")
    if task.size("train") == 0:
        raise UserError(f"{where}: it has no training question; at least 1 is needed; give it data")
    return task


def _call(factory: Any, arguments: dict[str, Any], name: str) -> Any:
    signature = inspect.signature(factory)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"experts.{name}.task_args: {arguments} was given; allowed is {signature}; "
                        f"correct it ({error})") from error
    return factory(**arguments)
