"""The only place that touches environment variables, apart from torchrun's rendezvous in ``parallel``."""

from __future__ import annotations

import os

DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # backbones and data are local folders: nothing may reach for the network
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",  # the tokenizers' threads and forked ranks do not go together
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # keeps Megatron's communication ahead of the kernels that hide it
}
"""Set where the user has not set them; each must be in place before the library that reads it is imported."""

INTERRUPTED = 130
"""Exit code of a command that was interrupted, or asked to stop and can be resumed."""


def set_defaults() -> None:
    """Put `DEFAULTS` into the environment; what the user set stays."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def rank() -> int:
    """This process's rank as torchrun numbers it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    """Whether this process speaks for the whole run: it prints and writes, the others keep quiet."""
    return rank() == 0


def started_as_rank() -> bool:
    """Whether torchrun, or another process of ours, started this one as a rank."""
    return "RANK" in os.environ


def of_rank(number: int, count: int, port: int) -> dict[str, str]:
    """The environment of rank ``number`` of ``count`` on this machine, whose store listens on ``port``."""
    cores = len(os.sched_getaffinity(0))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // count))} if "OMP_NUM_THREADS" not in os.environ else {}
    return os.environ | threads | {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
