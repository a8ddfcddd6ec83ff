"""Answers: how one is read out of a completion, and the verifiers that compare it with the reference.

Whatever a completion holds, a verifier returns a score: every text is bounded in length, every pattern runs
in linear time, and the one open-ended computation (math-verify) lives in a process that can be killed.
"""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from copd_megatron.tasks.math_equality import mathematically_equal

MAX_COMPLETION_CHARS = 100_000
"""Only the last so many characters of a completion are read: the answer comes last."""
MAX_ANSWER_CHARS = 1000
"""A longer answer is no answer."""
_MAX_BOXES_TRIED = 8


# ---- reading the answer ----------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a completion gives as its answer. Example: ``Answer("1/2", explicit=True)``."""

    text: str
    explicit: bool
    """Marked as the answer (boxed, tagged or announced), not merely the last line."""


# All repetitions are bounded, so that no input makes them backtrack for long.
_ANNOUNCED = re.compile(
    r"answer[*\s]{0,8}(?:is\b[*\s]{0,8}:?|:|=)[*\s]{0,8}([^\n]+)|####[^\S\n]{0,8}([^\n]+)", re.IGNORECASE)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ('"', '"'))


def extract_answer(completion: str) -> Answer | None:
    r"""The last ``\boxed{...}``, else the last ``<answer>...</answer>``, else what follows the last
    "answer:", "answer is" or "####", else the last line that is not empty. Reasoning up to ``</think>`` is
    not read.

    None if there is no text, or if the answer is longer than ``MAX_ANSWER_CHARS``.
    """
    if not isinstance(completion, str):
        return None
    text = completion[-MAX_COMPLETION_CHARS:].rpartition("</think>")[2]
    marked = _last_boxed(text)
    if marked is None:
        marked = _last_tagged(text)
    if marked is None and (announced := _ANNOUNCED.findall(text)):
        marked = "".join(announced[-1])  # one of the two forms, the other is empty
    found = _strip_wrappers(text.rstrip().rpartition("\n")[2] if marked is None else marked)
    if not found or len(found) > MAX_ANSWER_CHARS:
        return None
    return Answer(found, explicit=marked is not None)


def _last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{}`` whose braces balance within the length of an answer."""
    end = len(text)
    for _ in range(_MAX_BOXES_TRIED):
        start = text.rfind(r"\boxed{", 0, end)
        if start < 0:
            return None
        depth, begin = 1, start + len(r"\boxed{")
        for position in range(begin, min(begin + MAX_ANSWER_CHARS + 1, len(text))):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[begin:position]
        end = start
    return None


def _last_tagged(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>"):end] if start >= 0 else None


def _strip_wrappers(text: str) -> str:
    """Without the spaces, the full stop, and the mathematics or emphasis marks around it."""
    text = text.strip()
    for _ in range(4):
        before = text
        text = text.removesuffix(".").rstrip()
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
                text = text[len(left):-len(right)].strip()
                break
        text = text.strip("*").strip()
        if text == before:
            break
    return text


# ---- normal forms ----------------------------------------------------------


_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_UNSIGNED = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?"
_NUMBER = re.compile(
    rf"([a-zA-Z]\w{{0,20}}\s*=\s*)?([-+]?)\s*[$€£¥]?\s*({_UNSIGNED})(?:\s*/\s*({_UNSIGNED}))?"
    r"\s*(%|°|(?<=\s)[a-zA-Z][^0-9=]{0,30})?")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_CHOICE = re.compile(r"(?:(?:the\s)?(?:correct\s)?(?:option|choice)\s*(?:is)?:?\s*)?"
                     r"\(?([a-zA-Z])(?:\)|\.|:|(?=\Z))(?:\s.*)?", re.DOTALL | re.IGNORECASE)
_BRACKETS = {"{": "}", "[": "]", "(": ")"}


def _plain(text: Any) -> str:
    """Unicode-normal, LaTeX text commands unwrapped, spaces collapsed."""
    text = unicodedata.normalize("NFKC", str(text)).replace("\u2212", "-")
    text = _LATEX_TEXT.sub(r" \1 ", text).replace(r"\$", "$").replace(r"\%", "%").replace(r"\,", "")
    return " ".join(_strip_wrappers(text).split())


def normal_text(text: Any) -> str:
    """``_plain``, without case and without punctuation at its ends: "  Paris. " and "paris" are one."""
    return _plain(text).casefold().strip(" .,;:!?'\"")


def number_in(text: Any, *, bare: bool = False) -> Fraction | None:
    r"""The number that the whole text is: "1,234.5", "-3e2", "3/4", "\frac{3}{4}", "50%" (a half), "$3.50",
    "x = 5", "12 cm" (the unit is not read); None for anything else. ``bare`` refuses names, units and
    percent: in mathematics "5 x" is not five of a unit."""
    plain = _THOUSANDS.sub("", _LATEX_FRACTION.sub(r"\1/\2", _plain(text)))
    match = _NUMBER.fullmatch(plain) if len(plain) <= MAX_ANSWER_CHARS else None
    if match is None:
        return None
    name, sign, numerator, denominator, unit = match.groups()
    if bare and (name or unit):
        return None
    below = Fraction(denominator or 1) * (100 if unit == "%" else 1)
    return Fraction(numerator) / below * (-1 if sign == "-" else 1) if below else None


def choice_in(text: Any) -> str | None:
    """The letter of a choice, upper case: "b", "(B)", "B. a dog", "Option B: a dog"; None if it is none."""
    match = _CHOICE.fullmatch(_plain(text))
    return match[1].upper() if match else None


def elements_in(value: Any) -> frozenset[Fraction | str]:
    r"""The elements of a list, or of a text such as "{1, 2}", "\{a; b\}" or "1, 2 and 3": numbers by value,
    other elements as ``normal_text``. A comma always separates, so "1,234" has two elements."""
    if not isinstance(value, str):
        parts = [str(part) for part in value]
    else:
        text = _plain(re.sub(r"\\(?:left|right)?(?=[\\({}\[\])])", "", value))
        text = text.replace(" and ", ",")
        parts = _split_outside_brackets(text)
        if len(parts) == 1 and text and text[-1:] == _BRACKETS.get(text[:1]):
            parts = _split_outside_brackets(text[1:-1])
    return frozenset(number if (number := number_in(part)) is not None else normal_text(part)
                     for part in parts if part.strip())


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


# ---- verifiers -------------------------------------------------------------


@dataclass(frozen=True)
class Verifier:
    """A verifier by name with its options. Example: ``Verifier("numeric", {"tolerance": 0.5})``."""

    name: str
    options: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VerifierKind:
    """What a name in ``VERIFIERS`` stands for."""

    equal: Callable[..., bool]
    """``equal(given text, reference answer, **options)``."""
    problem: Callable[[Any], str | None]
    """Why a reference answer cannot serve, None if it can."""
    options: frozenset[str] = frozenset()


def _equal_exact(given: str, reference: Any) -> bool:
    return normal_text(given) == normal_text(reference)


def _equal_choice(given: str, reference: Any) -> bool:
    return choice_in(given) == choice_in(reference) is not None


def _equal_numeric(given: str, reference: Any, tolerance: float = 0.0, relative: float = 1e-6) -> bool:
    """|given - reference| <= max(tolerance, relative * |reference|)."""
    actual, expected = number_in(given), number_in(reference)
    if actual is None or expected is None:
        return False
    return abs(actual - expected) <= max(Fraction(tolerance), Fraction(relative) * abs(expected))


def _equal_set(given: str, reference: Any) -> bool:
    return elements_in(given) == elements_in(reference)


def _equal_math(given: str, reference: Any) -> bool:
    """Equal texts and numbers are settled here; math-verify decides about the rest."""
    given, reference = _plain(given), _plain(reference)
    if given == reference:
        return True
    numbers = number_in(given, bare=True), number_in(reference, bare=True)
    if None not in numbers:
        if numbers[0] == numbers[1]:
            return True
        if all(number.denominator == 1 for number in numbers):
            return False
    return mathematically_equal(reference, given)


def _is_text(answer: Any) -> str | None:
    if isinstance(answer, (list, tuple, dict)) or answer is None:
        return "is no text or number"
    if not str(answer).strip():
        return "is empty"
    return f"has over {MAX_ANSWER_CHARS} characters" if len(str(answer)) > MAX_ANSWER_CHARS else None


def _is_choice(answer: Any) -> str | None:
    return _is_text(answer) or (None if choice_in(answer) else "is no single letter such as 'B'")


def _is_number(answer: Any) -> str | None:
    return _is_text(answer) or (None if number_in(answer) is not None else "is no number")


def _is_set(answer: Any) -> str | None:
    if isinstance(answer, dict) or answer is None:
        return "is no list or text"
    elements = elements_in(answer if isinstance(answer, (list, tuple)) else str(answer))
    return None if elements else "has no element"


VERIFIERS: dict[str, VerifierKind] = {
    "math": VerifierKind(_equal_math, _is_text),
    "exact": VerifierKind(_equal_exact, _is_text),
    "choice": VerifierKind(_equal_choice, _is_choice),
    "numeric": VerifierKind(_equal_numeric, _is_number, frozenset({"tolerance", "relative"})),
    "set": VerifierKind(_equal_set, _is_set),
}
"""Every verifier by name."""


def parse_verifier(given: Any) -> Verifier:
    """A verifier from "numeric" or {"name": "numeric", "tolerance": 0.5}.

    Raises:
        ValueError: unknown name or option; the message is ``what was given; what is allowed``.
    """
    options = dict(given) if isinstance(given, Mapping) else {"name": given}
    # Parquet fills the options that a row lacks with null.
    options = {key: value for key, value in options.items() if value is not None}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in VERIFIERS:
        raise ValueError(f"{name!r} is no verifier; allowed are {sorted(VERIFIERS)}")
    allowed = VERIFIERS[name].options
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(f"verifier {name} has no option {key!r}; allowed are {sorted(allowed)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"option {key} of verifier {name} is {value!r}; allowed is a finite number >= 0")
    return Verifier(name, options)


def check_reference(verifier: Verifier, answer: Any) -> None:
    """Raise ValueError, saying why, if ``answer`` cannot be the reference of this verifier."""
    if problem := VERIFIERS[verifier.name].problem(answer):
        raise ValueError(f"{str(answer)[:60]!r} {problem}, as verifier {verifier.name} needs")


def score_answer(verifier: Verifier, completion: str, reference: Any) -> dict[str, float]:
    """accuracy: the answer equals the reference; format: it was marked as the answer. Each 0.0 or 1.0; a
    completion without an answer scores 0 in both."""
    found = extract_answer(completion)
    if found is None:
        return {"accuracy": 0.0, "format": 0.0}
    correct = VERIFIERS[verifier.name].equal(found.text, reference, **verifier.options)
    return {"accuracy": float(correct), "format": float(found.explicit)}
