"""Objects named as "pkg.module:Name": how a config points at code outside the package."""
from __future__ import annotations

import importlib
from typing import Any

from copd_megatron.types import UserError


def import_reference(reference: str) -> Any:
    """The object that ``"pkg.module:Name"`` names; ``Name`` may be dotted ("pkg.module:Class.method").

    Raises:
        ValueError: the text is no such reference, or the module or the name does not exist. The message reads
            as the rest of a sentence, "'x' ...; ...", for the caller to put ``section.field:`` in front. Any
            other error that the module raises while it is imported passes through with its own traceback.
    """
    module_name, colon, name = reference.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{reference!r} was given; allowed is 'pkg.module:Name', for example "
                         "'my_tasks.chess:ChessTask'; write the module, a colon and the name")
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ValueError(f"{reference!r} was given; there is no module {error.name!r}; install it, or "
                         "put its folder on PYTHONPATH") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [other for other in dir(found) if not other.startswith("_")]
            raise ValueError(f"{reference!r} was given; {module_name} has no {part!r}, it has {public[:12]}; "
                             "correct the name")
        found = getattr(found, part)
    return found


def resolve_object(value: Any, field: str = "object") -> Any:
    """The object itself, or the one that a "pkg.module:Name" names; ``field`` is the key shown in errors.

    Raises:
        UserError: the text has another form, the module cannot be imported, or has no such name.
    """
    if not isinstance(value, str):
        return value
    try:
        return import_reference(value)
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{field}: {value!r} was given; importing it failed with {reason}; mend the module") from error
