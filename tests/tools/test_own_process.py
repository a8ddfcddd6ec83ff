"""Work in a process of its own: results and errors come back, a lost process and a lost thread are one line each."""
import math
import os
import sys
import time
from pathlib import Path

import pytest

from copd_megatron.types import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))  # spawned processes look there, too

from own_process import in_a_process  # noqa: E402


def test_results_and_arithmetic_errors_come_back():
    assert in_a_process(math.gcd, 12, 18) == 6
    assert in_a_process(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_a_process(divmod, 1, 0)


def test_a_process_that_ends_is_one_line():
    with pytest.raises(UserError, match="_exit: its process ended with 3; -9 means that memory was out"):
        in_a_process(os._exit, 3)


def test_a_process_that_hangs_is_ended_and_shows_where(capfd):
    started = time.monotonic()
    with pytest.raises(UserError, match="sleep: nothing after 3 s; its stacks are above"):
        in_a_process(time.sleep, 600, limit_s=3)
    assert time.monotonic() - started < 60
    assert "in _child" in capfd.readouterr().err
