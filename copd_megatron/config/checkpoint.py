"""What is saved, and when."""
from pydantic import Field

from copd_megatron.config.section import Section


class CheckpointConfig(Section):
    """Atomic saves of adapters, optimizers and loop state."""

    every: int = Field(0, ge=0)
    """Steps between saves; 0: only at the end and on interruption."""
    keep_last: int = Field(3, ge=1)
    """Older saves beyond this many are removed."""
    export_merged: bool = True
    """Scope ``sequence``: write a merged Hugging Face directory at the end."""
