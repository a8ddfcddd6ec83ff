"""Reward functions that users bring: their form is read off their parameters, and they are called
accordingly.

===================================================
=========================================================== ``f(item, completion)``
once per completion; the parameters may have other names ``f(items, completions)``
once per batch; exactly these names ``f(data_source, solution_str, ground_truth, ...)``  verl's
``compute_score``, once per completion ``f(data_sources, solution_strs, ...)``              verl's batched
form, once per batch ===================================================
===========================================================

Each may be ``async``; it returns a number, or a dict with the number under "score". verl's names are those of
its ``verl/utils/reward_score`` (https://github.com/volcengine/verl).
"""
from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from copd_megatron.config.reference import resolve_object
from copd_megatron.types import TaskItem, UserError

MAX_CONCURRENT = 256
"""Calls of an async function that are under way at once."""

VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
VERL_BATCH = tuple(f"{name}s" for name in VERL)
BATCH = ("items", "completions")
KEYWORD_FORMS = ((VERL, {"solution_str", "ground_truth"}), (VERL_BATCH, {"solution_strs", "ground_truths"}),
                 (BATCH, set(BATCH)))
"""Parameters of each form that is told by names, and those of them that tell it."""


@dataclass(frozen=True)
class RewardCall:
    """A user's function with one face for all forms."""

    function: Callable[..., Any]
    name: str
    """As errors show it: "experts.text.rewards.style.function (my_rewards.style)"."""
    parameters: tuple[str, ...]
    """The keyword arguments that it is given; () for (item, completion) by position."""
    batched: bool

    @classmethod
    def build(cls, given: Any, where: str) -> RewardCall:
        """From a callable or its "pkg.module:name"; ``where`` begins an error.

        Raises:
            UserError: not found, not callable, or parameters of no known form.
        """
        function = resolve_object(given, where)
        if not callable(function):
            raise UserError(f"{where}: a {type(function).__name__} was given; allowed is a function or "
                            "'pkg.module:name'; correct it")
        name = f"{where} ({_name_of(function)})"
        parameters = inspect.signature(function).parameters
        needed = [key for key, parameter in parameters.items() if parameter.default is parameter.empty
                  and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]
        for known, marks in KEYWORD_FORMS:
            if marks <= set(parameters) and set(needed) <= set(known):
                taken = tuple(key for key in known if key in parameters)
                return cls(function, name, taken, batched=known is not VERL)
        by_position = [key for key in needed if parameters[key].kind is not inspect.Parameter.KEYWORD_ONLY]
        if len(needed) == len(by_position) == 2 and not set(needed) & {*VERL, *VERL_BATCH}:
            return cls(function, name, (), batched=False)
        raise UserError(f"{name}: it takes {inspect.signature(function)}; allowed are (item, completion), "
                        f"{BATCH}, {VERL} and {VERL_BATCH}; rename its parameters, give others a default, or "
                        "bind them with functools.partial")

    def __call__(self, items: Sequence[TaskItem], completions: Sequence[str]
                 ) -> list[tuple[float, dict[str, float]]]:
        """The value of each completion, and the other numbers of a returned dict.

        Raises:
            UserError: the function raised, or returned no finite number, or (batched) not one per completion.
        """
        keys = [item.key for item in items]
        if not keys:
            return []
        if self.batched:
            batch_key = keys[0] if len(keys) == 1 else f"{keys[0]} to {keys[-1]}"
            results, = self._finish([self._start(batch_key, list(items), list(completions))], [batch_key])
            count = len(results) if hasattr(results, "__len__") else f"a {type(results).__name__}"
            if count != len(keys):
                raise UserError(f"{self.name}: it returned {count} for {len(keys)} completions; allowed is a "
                                "list with one result for each; correct it")
        else:
            results = self._finish([self._start(item.key, item, completion)
                                    for item, completion in zip(items, completions)], keys)
        return [self._read(result, key) for result, key in zip(results, keys)]

    def _start(self, key: str, items: Any, completions: Any) -> Any:
        """Call the function once; an async one returns what is to be awaited."""
        try:
            if not self.parameters:
                return self.function(items, completions)
            if self.batched:
                rows = [_arguments(item, completion) for item, completion in zip(items, completions)]
                known = {f"{name}s": [row[name] for row in rows] for name in rows[0]}
            else:
                known = _arguments(items, completions)
            return self.function(**{name: known[name] for name in self.parameters})
        except Exception as error:
            raise failure(self.name, key, error) from error

    def _finish(self, results: list[Any], keys: Sequence[str]) -> list[Any]:
        """Await together what is to be awaited."""
        waiting = [place for place, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            outcomes = _gather([results[place] for place in waiting])
            for place, outcome in zip(waiting, outcomes):
                if isinstance(outcome, BaseException):
                    raise failure(self.name, keys[place], outcome) from outcome
                results[place] = outcome
        return results

    def _read(self, result: Any, key: str) -> tuple[float, dict[str, float]]:
        if not isinstance(result, Mapping):
            return finite_number(result, self.name, key), {}
        if "score" not in result:
            raise UserError(f"{self.name}: for {key} it returned a dict with {sorted(map(str, result))}; "
                            "allowed is one with 'score'; add it")
        others = {str(name): float(value) for name, value in result.items()
                  if name != "score" and isinstance(value, (bool, int, float)) and math.isfinite(value)}
        return finite_number(result["score"], self.name, key), others


def finite_number(value: Any, name: str, key: str) -> float:
    """The value (number, NumPy or torch scalar) as a float; UserError naming function and item otherwise."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name}: for {key} it returned {str(value)[:60]!r}; allowed is a finite number; "
                        "correct it")
    return number


def failure(name: str, key: str, error: BaseException) -> UserError:
    """What the user is told when ``name`` raised on item ``key``: the last line of the traceback says
    where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return UserError(f"{name}: for {key} it raised {type(error).__name__}: {error}{place}; it must return a "
                     "number for every completion; correct it")


def _arguments(item: TaskItem, completion: str) -> dict[str, Any]:
    """What a function may ask for about a completion, by the singular of its parameter."""
    return {"item": item, "completion": completion,
            "data_source": item.extra.get("data_source", item.key.partition("/")[0]),
            "solution_str": completion,
            "ground_truth": item.answer,
            "extra_info": item.extra.get("extra_info", item.extra)}


def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results and exceptions of all, in order. In a thread: the caller may be inside an event loop
    (notebooks)."""
    async def gathered() -> list[Any]:
        slots = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(awaitable: Awaitable[Any]) -> Any:
            async with slots:
                return await awaitable

        return await asyncio.gather(*map(one, awaitables), return_exceptions=True)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, gathered()).result()


def _name_of(function: Any) -> str:
    function = getattr(function, "func", function)  # functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '?')}.{name}"
