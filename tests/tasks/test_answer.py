"""Answers are read where people put them, judged by value, and never stop or hang a run."""
import os
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from copd_megatron.tasks import math_equality
from copd_megatron.tasks.answer import (
    VERIFIERS,
    Verifier,
    check_reference,
    elements_in,
    extract_answer,
    parse_verifier,
    score_answer,
)


@pytest.mark.parametrize("completion, text, explicit", [
    (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}", True),
    (r"first \boxed{1}, then \boxed{2}.", "2", True),
    (r"\boxed{7} and then cut: \boxed{\frac{1", "7", True),
    ("<answer> 12 </answer>", "12", True),
    ("<answer>3</answer> but \\boxed{4}", "4", True),
    ("answer: 5", "5", True),
    ("The answer is **12**.", "12", True),
    ("**Answer:** $x+1$", "x+1", True),
    ("Answer:\n7", "7", True),
    ("some steps\n#### 1,234", "1,234", True),
    ("answer: 1\nno, answer: 2", "2", True),
    ("<think>answer: 1</think>\n3", "3", False),
    ("first line\n 42. \n\n", "42", False),
])
def test_where_the_answer_is(completion, text, explicit):
    found = extract_answer(completion)
    assert (found.text, found.explicit) == (text, explicit)


@pytest.mark.parametrize("completion", ["", "  \n ", "\\boxed{}", "$$", None, 5, "x" * 1001])
def test_no_answer(completion):
    assert extract_answer(completion) is None
    assert score_answer(Verifier("exact"), completion, "x") == {"accuracy": 0.0, "format": 0.0}


EQUAL = [
    ("exact", " paris. ", "Paris"), ("exact", r"\text{red}", "red"), ("exact", "ﬁne", "fine"),
    ("exact", "7", 7),
    ("choice", "B", "b"), ("choice", "(B) a dog", "B"), ("choice", "B. a dog", "(B)"),
    ("choice", r"\text{C}", "C"),
    ("choice", "The correct option is D.", "D"), ("choice", "**A**", "A"),
    ("numeric", "1,234.50", 1234.5), ("numeric", "50%", "0.5"), ("numeric", "$3.50", "3.5"),
    ("numeric", r"\frac{3}{4}", 0.75), ("numeric", "x = -5", -5), ("numeric", "12 cm", "12"),
    ("numeric", "\u22122", -2), ("numeric", "1e3", 1000),
    ("set", r"\{1, 2\}", "2, 1"), ("set", "red and Blue", ["blue", "red"]), ("set", "[1.0; 2; 2]", [1, 2]),
    ("set", "(0,1), (1,0)", ["(1,0)", "(0,1)"]),
    ("math", "1+x^2", "x^2+1"), ("math", r"\frac{1}{2}", "0.5"), ("math", "(1, 2)", "(1,2)"),
    ("math", "12", 12),
    ("math", r"\{2, 1\}", r"\{1,2\}"), ("math", "x = 5", "5"), ("math", r"2\sqrt{2}", r"\sqrt{8}"),
]
DIFFERENT = [
    ("exact", "Paris, France", "Paris"), ("choice", "A dog", "A"), ("choice", "C", "B"),
    ("choice", "AB", "A"),
    ("numeric", "5", 6), ("numeric", "50", "50%"), ("numeric", "5 or 6", 5), ("numeric", "1/0", 5),
    ("numeric", "five", 5), ("numeric", "123456", 123457), ("set", "1, 2, 3", [1, 2]), ("set", "1", [1, 2]),
    ("math", "5 x", "5"), ("math", "6", "5"), ("math", "x^2", "x^3"), ("math", "(2, 1)", "(1,2)"),
    ("math", "no number", "5"),
]


@pytest.mark.parametrize("name, completion, reference", EQUAL)
def test_equal(name, completion, reference):
    check_reference(Verifier(name), reference)
    for text, marked in ((f"answer: {completion}", 1.0), (completion, 0.0)):
        assert score_answer(Verifier(name), text, reference) == {"accuracy": 1.0, "format": marked}


@pytest.mark.parametrize("name, completion, reference", DIFFERENT)
def test_different(name, completion, reference):
    score = score_answer(Verifier(name), f"answer: {completion}", reference)
    assert score == {"accuracy": 0.0, "format": 1.0}


@pytest.mark.parametrize("options, value, correct", [
    ({"tolerance": 0.5}, "10.5", 1.0), ({"tolerance": 0.5}, "10.6", 0.0),
    ({"relative": 0.1}, "11", 1.0), ({"relative": 0.1}, "11.1", 0.0), ({"relative": 0}, "10.00000001", 0.0),
])
def test_tolerance_of_numeric(options, value, correct):
    verifier = parse_verifier({"name": "numeric", **options})
    assert score_answer(verifier, value, 10)["accuracy"] == correct


def test_elements_of_a_set():
    assert elements_in(r"\left\{\frac{1}{2}, 3, f(a,b)\right\}") == elements_in(["0.5", 3, "F(A,B)"])


@pytest.mark.parametrize("given_, message", [
    ("maths", "'maths' is no verifier; allowed are"), (None, "no verifier"), (3, "no verifier"),
    ({"tolerance": 1}, "None is no verifier"), ({"name": "exact", "tolerance": 1}, "no option 'tolerance'"),
    ({"name": "numeric", "tolerance": -1}, "allowed is a finite number"),
    ({"name": "numeric", "tolerance": "big"}, "allowed is a finite number"),
])
def test_bad_verifier(given_, message):
    with pytest.raises(ValueError, match=message):
        parse_verifier(given_)


@pytest.mark.parametrize("name, reference, message", [
    ("exact", " ", "is empty"), ("math", ["1"], "is no text"), ("math", "1" * 1001, "over 1000 characters"),
    ("choice", "AB", "is no single letter"), ("numeric", "five", "is no number"),
    ("set", [], "has no element"),
    ("set", {"a": 1}, "is no list"),
])
def test_bad_reference(name, reference, message):
    with pytest.raises(ValueError, match=message):
        check_reference(Verifier(name), reference)


# ---- hostile input --------------------------------------------------------

HOSTILE = [
    "answer is" + "\n" * 200_000, "answer is " * 30_000, "<answer>" * 40_000, "\\boxed{" * 40_000,
    "*" * 200_000, "answer" + " " * 100_000, "answer: " + "\\frac{" * 150, "answer: " + "1" * 999,
    "answer: 1e999999999", "answer: " + "1," * 499, "answer: " + "\\text{" * 150, "answer: " + "(" * 990,
    "answer: \x00\ud800", "answer: " + "$" * 999, "answer: 1/" + "9" * 900, "answer: x" + " " * 900]


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name != "math"])
def test_hostile_completions_score_zero_at_once(name):
    start = time.process_time()
    for completion in HOSTILE:
        assert score_answer(Verifier(name), completion, "7")["accuracy"] == 0.0
    assert time.process_time() - start < 2.0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="0123456789.,/%$\\{}()[]=eEx \n<>-#*boxedanswer:\u0663\u00bd\u221e", max_size=60),
       st.sampled_from([name for name in VERIFIERS if name != "math"]))
def test_any_text_gets_a_score(text, name):
    for completion in (text, f"answer: {text}", f"\\boxed{{{text}}}"):
        assert set(score_answer(Verifier(name), completion, "7").values()) <= {0.0, 1.0}


def test_math_that_never_ends_scores_zero_and_the_next_answer_is_judged(monkeypatch):
    monkeypatch.setattr(math_equality, "ANSWER_LIMIT_S", 0.5)
    score = score_answer(Verifier("math"), r"\boxed{9^{9^{9^{9}}}}", "1")
    assert score == {"accuracy": 0.0, "format": 1.0}
    monkeypatch.setattr(math_equality, "ANSWER_LIMIT_S", 30.0)
    assert score_answer(Verifier("math"), r"\boxed{y+x}", "x+y")["accuracy"] == 1.0


@pytest.mark.parametrize("text", [r"\frac{1}{", "((((", r"\sqrt", "\x00", "x" * 300, r"\begin{matrix}"])
def test_malformed_math_scores_zero(text):
    assert score_answer(Verifier("math"), f"answer: {text}", "17")["accuracy"] == 0.0


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_math_in_other_threads_and_after_fork():
    """No signals: any thread may ask; a forked child asks a worker of its own."""
    verdicts = {}

    def ask(number):
        completion = f"answer: {number}+z"
        verdicts[number] = score_answer(Verifier("math"), completion, f"z+{number}")["accuracy"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}

    parents = math_equality._worker
    child = os.fork()
    if child == 0:
        status = 1
        try:
            own = math_equality._worker is not parents
            verdict = score_answer(Verifier("math"), "answer: 9+w", "w+9")["accuracy"]
            math_equality._worker.close()
            status = 0 if own and verdict == 1.0 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert score_answer(Verifier("math"), "answer: 8+w", "w+8")["accuracy"] == 1.0
