"""The most memory a piece of work took, by the kernel's own high-water mark of resident pages (Linux)."""
from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path
from types import TracebackType

from copd_megatron.types import UserError

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Writing 5 to the first one resets VmHWM in the second one (proc_pid_clear_refs(5))."""


class PeakMemory:
    """Within the block the high-water mark is that of the block; afterwards ``peak_bytes`` is what it took beyond
    what the process held at the beginning, and ``seconds`` how long.

    Raises:
        UserError: the system has no such mark.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # what was freed but not given back would serve the block and hide what it takes
        try:
            CLEAR.write_text("5")
        except OSError as error:
            raise UserError(f"--profile: {CLEAR} cannot be written ({error}); it needs Linux's high-water mark of "
                            "memory; leave it out") from error
        self._before, self._start = _resident("VmRSS"), time.monotonic()
        self.peak_bytes, self.seconds = 0, 0.0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.peak_bytes, self.seconds = _resident("VmHWM") - self._before, time.monotonic() - self._start


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
