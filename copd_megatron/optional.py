"""Parts that Megatron-Core picks up by themselves when they are importable: are they sound on this machine?

Decided from files, without importing them, because importing the wrong one is what does harm:

* PyPI's ``apex`` is a web toolkit; Megatron-Core takes anything of that name for NVIDIA's and then asks for
  fused norms that do not exist. NVIDIA's own, built without its CUDA extensions, is chosen for its FusedAdam,
  which then raises.
* Transformer Engine raises RuntimeError at import where its CUDA libraries are absent; Megatron-Core expects
  ImportError.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

APEX_EXTENSIONS = {
    "fused Adam": "amp_C",
    "fused layer norm": "fused_layer_norm_cuda",
    "fast layer norm": "fast_layer_norm",
    "gradient accumulation fusion": "fused_weight_gradient_mlp_cuda",
}
"""What NVIDIA Apex offers -> the top-level extension module that does it."""


def apex_capabilities() -> tuple[str, ...]:
    """What the importable NVIDIA Apex can do; () where no sound one is importable."""
    if find_spec("apex") is None or apex_problem() is not None:
        return ()
    return tuple(name for name, module in APEX_EXTENSIONS.items() if find_spec(module) is not None)


def apex_problem() -> str | None:
    """Why an importable ``apex`` must not be there, and what to do; None if it is sound or absent."""
    spec = find_spec("apex")
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "multi_tensor_apply/__init__.py").is_file() for folder in folders):
        return "this apex is not NVIDIA's; pip uninstall apex"
    if find_spec(APEX_EXTENSIONS["fused Adam"]) is None:
        return (
            "NVIDIA Apex without its CUDA extensions; rebuild it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, "
            "or pip uninstall apex"
        )
    return None


Maker = Literal["torch", "te", "apex"]
"""Who computes what all three can: plain torch, Transformer Engine, NVIDIA Apex."""

_HOW = {"te": "pip install --no-build-isolation 'copd-megatron[te]'",
        "apex": "build NVIDIA/apex from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"}


def choose_maker(field: str, wanted: str, part: str, cuda: bool) -> Maker:
    """Who acts for a field of the configuration: "auto" is Transformer Engine, else a sound Apex, else torch.

    Args:
        part: what Apex must have been built with, see ``APEX_EXTENSIONS``.
        cuda: whether fused kernels can run: on a CUDA device, and not in float64.

    Raises:
        UserError: what was asked for is not there.
    """
    there: list[Maker] = ["torch"]
    if cuda and part in apex_capabilities():
        there.insert(0, "apex")
    if cuda and find_spec("transformer_engine") is not None:
        there.insert(0, "te")
    if wanted == "auto":
        _say(field, there[0])
        return there[0]
    if wanted not in there:
        from copd_megatron.types import UserError

        needs = "it is missing" if cuda else "it needs a CUDA device and no float64"
        raise UserError(f"{field}: {wanted}, but {needs}; possible here: {', '.join(there)}; {_HOW[wanted]}, or set "
                        f"{field}=auto")
    return wanted


@lru_cache
def _say(field: str, maker: Maker) -> None:
    """One line per process, where it is not the definition."""
    if maker != "torch":
        logging.getLogger(__name__).info("%s: auto takes %s", field, maker)


def transformer_engine_problem(cuda_available: bool) -> str | None:
    """Why Transformer Engine must not be there, and what to do; None if it can run or is absent."""
    if cuda_available or find_spec("transformer_engine") is None:
        return None
    return "Transformer Engine without a CUDA device; pip uninstall transformer-engine, or use a GPU"


def refuse_harmful_parts(cuda_available: bool) -> None:
    """Stop before Megatron-Core is imported into an environment in which it would fail obscurely.

    Raises:
        UserError: a foreign or incomplete Apex, or Transformer Engine without CUDA.
    """
    from copd_megatron.types import (
        UserError,
    )  # here, so that `copd doctor` can use this module where NumPy is missing

    for problem in (apex_problem(), transformer_engine_problem(cuda_available)):
        if problem is not None:
            raise UserError(f"environment: {problem}; `copd doctor` shows the whole environment")
