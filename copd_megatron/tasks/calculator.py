"""A small task with several turns: the policy may ask a calculator before it answers.

    policy       calc: 12*30
    environment  = 360
    policy       answer: 360
"""
from __future__ import annotations

import ast
import hashlib
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from copd_megatron.tasks.base import Split
from copd_megatron.types import TaskItem, UserError

HELD_OUT_ONE_IN = 4
"""One expression in this many is held out."""
MAX_EXPRESSION_CHARS = 100
MAX_MAGNITUDE = 10**12
"""No number, result or step in between, may be larger."""

_CALL = re.compile(r"^[^\S\n]*calc:([^\n]*)$", re.MULTILINE)
_ANSWER = re.compile(r"answer:[^\S\n]*(-?[0-9]{1,20})\b")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: operator.mod}
_STREAM = {"train": 0, "held_out": 1}


def evaluate(expression: str) -> Fraction:
    """Exact value of a sum, difference, product or quotient of numbers, brackets allowed; nothing else is
    run.

    Raises:
        ValueError: anything else, division by zero, over ``MAX_EXPRESSION_CHARS``, or a number over
            ``MAX_MAGNITUDE``.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"over {MAX_EXPRESSION_CHARS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError("no expression") from error
    return _value(tree.body)


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value = _fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            try:
                value = _OPERATORS[type(op)](_value(left), _value(right))
            except ZeroDivisionError as error:
                raise ValueError("division by zero") from error
        case _:
            raise ValueError("only numbers, + - * / // % and brackets")
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError("too large")
    return value


def _fraction(number: int | float) -> Fraction:
    if not abs(number) <= MAX_MAGNITUDE:  # before the conversion: infinity has no fraction
        raise ValueError("too large")
    return Fraction(str(number))


class CalculatorTask:
    """Arithmetic on integers with a calculator at hand; a ``Task`` and an ``Environment``."""

    def __init__(self, *, digits: int = 2, terms: int = 3, max_calls: int = 4, held_out_size: int = 256,
                 seed: int = 0) -> None:
        """Expressions have ``terms`` numbers of up to ``digits`` digits; after ``max_calls`` calculations the
        episode ends.

        Raises:
            UserError: a number is out of range.
        """
        # 3 digits in 4 factors stay within MAX_MAGNITUDE.
        limits = {"digits": (digits, 1, 3), "terms": (terms, 2, 4), "max_calls": (max_calls, 1, 100),
                  "held_out_size": (held_out_size, 1, 10**6)}
        for name, (given, low, high) in limits.items():
            if not low <= given <= high:
                raise UserError(f"task_args.{name}: {given} was given; allowed is {low} to {high}; "
                                "correct it")
        self._digits, self._terms, self._seed = digits, terms, seed
        self._max_calls, self._held_out_size = max_calls, held_out_size

    def size(self, split: Split) -> int | None:
        """Training questions never end."""
        return None if split == "train" else self._held_out_size

    def item(self, split: Split, index: int) -> TaskItem:
        """The question at ``index``. Its split is a hash of the expression, so that the two never overlap."""
        if index < 0 or (split == "held_out" and index >= self._held_out_size):
            raise IndexError(f"question {index} of {split}")
        rng = np.random.default_rng([self._seed, _STREAM[split], index])
        while _split_of(expression := self._draw(rng)) != split:
            pass
        text = f"{expression} = ? Write 'calc: ...' to use the calculator, then 'answer: ...'."
        return TaskItem(f"calculator/{split}/{self._seed}/{index}", [{"role": "user", "content": text}], (),
                        str(evaluate(expression)), {"data_source": "calculator", "expression": expression})

    def respond(self, item: TaskItem, turns: Sequence[str]) -> str | None:
        """"= value" for the last ``calc:`` line of the last turn, "= error" if it cannot be computed; None if
        that turn answers or asks nothing, or after ``max_calls`` calculations."""
        calls = _CALL.findall(turns[-1])
        if not calls or _ANSWER.search(turns[-1]) or len(turns) // 2 >= self._max_calls:
            return None
        try:
            return f"\n= {_shown(evaluate(calls[-1]))}\n"
        except ValueError:
            return "\n= error\n"

    def verify(self, item: TaskItem, completion: str) -> dict[str, float]:
        """accuracy: the last ``answer:`` is right; format: there is one."""
        answer = self.extract(completion)
        return {"accuracy": float(answer == item.answer), "format": float(answer is not None)}

    def extract(self, completion: str) -> str | None:
        """The last ``answer:``, an integer without leading zeros."""
        found = _ANSWER.findall(completion)
        return str(int(found[-1])) if found else None

    def _draw(self, rng: np.random.Generator) -> str:
        numbers = rng.integers(1, 10**self._digits, size=self._terms)
        signs = rng.choice(["+", "-", "*"], size=self._terms - 1)
        return str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:]))


def _split_of(expression: str) -> Split:
    number = int.from_bytes(hashlib.sha256(expression.encode()).digest()[:8])
    return "held_out" if number % HELD_OUT_ONE_IN == 0 else "train"


def _shown(value: Fraction) -> str:
    """An integer as it is, another number with six significant digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
