"""The frozen backbone's linears in FP8 rows: 1 byte per parameter, one scale per output row.

Scales are those of whole rows, before tensor parallelism cuts them, so the bytes do not depend on the layout.
Activations are quantised per token where a product needs them (``copd_kernels.rowwise_fp8``), so a token's result does
not depend on its neighbours, and rollout, scoring and training, which all pass these linears, agree. Embedding, norms,
head, router and adapters stay in the backbone's dtype.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from copd_kernels.rowwise_fp8.reference import ALIGNMENT, FP8, cast, row_scales
from copd_megatron.types import UserError

SCALE = "weight_scale"
"""Buffer beside a quantised ``weight``: [out, 1] float32."""


def hold_in_fp8(linear: nn.Module, name: str) -> None:
    """Give a tensor-parallel linear an FP8 weight and its scales, both still to be filled.

    Raises:
        UserError: sizes that FP8 products cannot take.
    """
    out, inp = linear.weight.shape
    if out % ALIGNMENT or inp % ALIGNMENT:
        raise UserError(f"model.fp8: frozen_rowwise, but {name} is [{out}, {inp}] on each rank; FP8 products need "
                        f"multiples of {ALIGNMENT}; use a smaller parallel.tensor, or model.fp8=none")
    device = linear.weight.device
    linear.weight = nn.Parameter(torch.empty(out, inp, dtype=FP8, device=device), requires_grad=False)
    linear.register_buffer(SCALE, torch.ones(out, 1, dtype=torch.float32, device=device))


def is_fp8(weight: Tensor) -> bool:
    """Whether a weight is kept in FP8 rows."""
    return weight.dtype == FP8


def quantised(rows: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """FP8 bytes of some columns of whole rows [n, in], and the rows' scales [n, 1]."""
    scales = row_scales(rows)
    return cast(rows[:, cols], scales), scales
