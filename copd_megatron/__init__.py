"""copd_megatron: co-evolving policy distillation on Megatron-Core."""

__version__ = "0.1.0"
