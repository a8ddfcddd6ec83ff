"""What is saved, when, and what may change at a resume."""
from typing import Literal

from pydantic import Field

from copd_megatron.config.section import Section


class CheckpointConfig(Section):
    """Atomic saves of adapters, optimizers and loop state."""

    every: int = Field(0, ge=0)
    """Steps between saves; 0: only at the end and on interruption."""
    keep_last: int = Field(3, ge=1)
    """Older saves beyond this many are removed."""
    keep_every: int = Field(0, ge=0)
    """Saves of steps that are a multiple of this stay for ever; 0: none does."""
    asynchronous: bool = True
    """Train on while a save is written; its failure then stops the run a step later. Exit waits for it."""
    on_new_expert: Literal["refuse", "init"] = "refuse"
    """At --resume, an expert that the save does not have: stop, or begin it afresh."""
    on_missing_expert: Literal["refuse", "drop"] = "refuse"
    """At --resume, an expert that only the save has: stop, or go on without it."""
    export_merged: bool = True
    """Scope ``sequence``: write a merged Hugging Face directory at the end."""
