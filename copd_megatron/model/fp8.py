"""The frozen backbone's linears in FP8: our rows, 1 byte per parameter with one scale per output row, or TE's (``te``).

Scales are those of whole rows, before tensor parallelism cuts them, so the bytes do not depend on the layout.
Activations are quantised per token where a product needs them (``copd_kernels.rowwise_fp8``), so a token's result does
not depend on its neighbours, and rollout, scoring and training, which all pass these linears, agree. Embedding, norms,
head, router and adapters stay in the backbone's dtype. MoE experts are linears like the others.
"""
from __future__ import annotations

from importlib.util import find_spec

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from copd_kernels.rowwise_fp8.reference import ALIGNMENT, FP8, cast, row_scales
from copd_megatron.model.te import RECIPES, TeProduct, check_machine
from copd_megatron.types import UserError

SCALE = "weight_scale"
"""Buffer beside a quantised ``weight``: [out, 1] float32."""


def check_fp8(fp8: str, dtype: torch.dtype, place: torch.device) -> None:
    """Refuse what ``model.fp8`` cannot be on this machine; of shapes alone (device "meta") anything can be.

    Raises:
        UserError: float64, or no machine for Transformer Engine.
    """
    if fp8 != "none" and dtype == torch.float64:
        raise UserError(f"model.fp8: {fp8} with model.dtype=float64; float32 and bfloat16 are allowed; choose one, or "
                        "model.fp8=none")
    if fp8 in RECIPES and place.type != "meta":
        capability = torch.cuda.get_device_capability(place) if place.type == "cuda" else None
        check_machine(fp8, capability, find_spec("transformer_engine") is not None)


def hold_in_te(linear: nn.Module, name: str, fp8: str, config: TransformerConfig, group: ProcessGroup) -> None:
    """Let a tensor-parallel linear multiply by Transformer Engine; its FP8 weight is still to be filled.

    Raises:
        UserError: sizes that FP8 products cannot take.
    """
    out, inp = _aligned(linear, name, fp8)
    if linear.weight.is_meta:
        linear.weight = nn.Parameter(torch.empty(out, inp, dtype=FP8, device="meta"), requires_grad=False)
        return
    linear.product = TeProduct(out, inp, fp8, config, group)
    linear.weight = linear.product.linear.weight


def hold_in_fp8(linear: nn.Module, name: str) -> None:
    """Give a tensor-parallel linear an FP8 weight and its scales, both still to be filled.

    Raises:
        UserError: sizes that FP8 products cannot take.
    """
    out, inp = _aligned(linear, name, "frozen_rowwise")
    device = linear.weight.device
    linear.weight = nn.Parameter(torch.empty(out, inp, dtype=FP8, device=device), requires_grad=False)
    linear.register_buffer(SCALE, torch.ones(out, 1, dtype=torch.float32, device=device))


def _aligned(linear: nn.Module, name: str, fp8: str) -> tuple[int, int]:
    """[out, in] of the rank's weight."""
    out, inp = linear.weight.shape
    if out % ALIGNMENT or inp % ALIGNMENT:
        raise UserError(f"model.fp8: {fp8}, but {name} is [{out}, {inp}] on each rank; FP8 products need "
                        f"multiples of {ALIGNMENT}; use a smaller parallel.tensor, or model.fp8=none")
    return out, inp


def is_fp8(weight: Tensor) -> bool:
    """Whether a weight is kept in FP8 rows."""
    return weight.dtype == FP8


def quantised(rows: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """FP8 bytes of some columns of whole rows [n, in], and the rows' scales [n, 1]."""
    scales = row_scales(rows)
    return cast(rows[:, cols], scales), scales
