"""Which implementation of the operators runs: the plain reference, or Triton.

Every operator's folder has ``reference`` and, where there is one, ``triton_impl`` with functions of the same names,
so that callers hold a module and do not care which. The choice is made once, when a model is built.
"""
import importlib
import importlib.util
from types import ModuleType
from typing import Literal

import torch

Backend = Literal["reference", "triton"]


def resolve(asked: Literal["auto", "reference", "triton"], device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of tensors on ``device``: ``auto`` is Triton on CUDA, and the reference in float64 and elsewhere.

    Args:
        dtype: of the hidden states.

    Raises:
        ValueError: Triton is asked for where it cannot run; the message says why.
    """
    missing = missing_for_triton(device, dtype)
    if asked == "triton" and missing:
        raise ValueError(f"triton: {missing}; auto and reference are allowed here; choose one of them")
    if asked == "auto":
        return "triton" if device.type == "cuda" and not missing else "reference"
    return asked


def missing_for_triton(device: torch.device, dtype: torch.dtype) -> str:
    """Why Triton cannot run on tensors of this device and dtype; empty if it can."""
    if dtype == torch.float64:
        return "float64 is for the reference only"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it comes with torch's CUDA builds)"
    if device.type != "cuda" and not importlib.import_module("triton").knobs.runtime.interpret:
        return f"it needs a CUDA device, this is {device.type}"
    return ""


def implementation(kernel: str, backend: Backend) -> ModuleType:
    """The module that implements an operator, e.g. ``implementation("vocab_topk", "triton").vocab_topk``."""
    return importlib.import_module(f"copd_kernels.{kernel}.{'triton_impl' if backend == 'triton' else 'reference'}")
