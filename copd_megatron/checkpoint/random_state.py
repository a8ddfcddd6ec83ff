"""The states of all global random generators of every rank: Python's, NumPy's, torch's, CUDA's, Megatron's.

Sampling and initialisation draw from keyed noise (``parallel.seeding``) and need none of this; a user's task or
reward may draw from any generator, and resuming must not change what it draws.
"""
from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker


def random_state() -> dict[str, Any]:
    """This rank's generators at this moment, made of tensors, numbers and strings."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {"python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "megatron": {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}}


def restore_random_state(state: dict[str, Any]) -> None:
    """Inverse of ``random_state``; CUDA's state is left alone where one side has none."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def save_random_states(file: Path, states: list[dict[str, Any]]) -> None:
    """Write the states of all ranks, by rank; OSError if the disk refuses."""
    buffer = io.BytesIO()  # torch.save itself turns the system's error into another
    torch.save(states, buffer)
    file.write_bytes(buffer.getbuffer())


def load_random_state(file: Path, rank: int) -> dict[str, Any]:
    """The state that ``save_random_states`` was given for a rank."""
    return torch.load(file, weights_only=True)[rank]
