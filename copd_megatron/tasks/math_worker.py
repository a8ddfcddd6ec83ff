"""Worker process that compares mathematical answers with math-verify; ``math_equality`` starts it.

Sympy has inputs on which it computes for ever, such as 9^{9^{9}}, inside C code that no Python signal can
interrupt. So it lives in a process that its parent may kill. Protocol, one JSON document a line: first
``{"ready": true}`` or ``{"error": text}``; then for each ``[reference, given]`` on standard input ``true`` or
``false`` on standard output.
"""
import json
import resource
import signal
import sys

CPU_LIMIT_S = 2.0
"""Processor time for one comparison; machine load does not shorten it."""
MEMORY_LIMIT_BYTES = 4 << 30


class OutOfTime(BaseException):
    """The comparison used its processor time (no ``Exception``, so that nobody's ``except Exception`` eats
    it)."""


def _out_of_time(_signal: int, _frame: object) -> None:
    raise OutOfTime


def _limit_process() -> None:
    """Bound the memory, and leave Ctrl-C to the parent: the end of standard input ends this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGVTALRM, _out_of_time)


def main() -> None:
    """Serve comparisons until standard input ends."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    _limit_process()
    print(json.dumps({"ready": True}), flush=True)

    def equal(reference: str, given: str) -> bool:
        # The library's own timeouts are off: they count wall-clock time, ours processor time.
        expected, actual = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, given))
        return bool(expected and actual and verify(expected, actual, timeout_seconds=None))

    for line in sys.stdin:
        reference, given = json.loads(line)
        try:
            # It fires again every 0.1 s, should a bare ``except`` of a library swallow the first one.
            signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT_S, 0.1)
            verdict = equal(reference, given)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        except (Exception, OutOfTime):  # whatever a malformed answer triggers in sympy: it is not equal
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            verdict = False
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
