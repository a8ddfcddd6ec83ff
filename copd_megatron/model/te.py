"""Transformer Engine, through Megatron's TE layers: the frozen backbone's linears in FP8, and a fused norm.

``te_current`` scales a whole tensor, by its largest magnitude; ``te_blockwise`` scales 1 x 128 numbers of a token and
128 x 128 of a weight (DeepSeek-AI 2024, arXiv:2412.19437). Only the latter's result for a token does not depend on the
tokens beside it, so the former's is never kept for another pass (``config.run``).

The adapter linear keeps what Megatron's own linears do between ranks and wraps a ``TELinear`` without parallelism,
which multiplies the rank's shard: of a column-parallel linear every rank of a tensor-parallel group quantises the same
gathered rows, so their scales agree without a message; of a row-parallel one each quantises its own columns. TE's own
sequence parallelism would decide at a module's first call whether ranks reduce their largest magnitudes, and ours is on
in training and off in decoding. The one ``TELinear`` serves rollout, scoring and training; its weight exists in FP8
only, on Hopper twice (as it is and transposed): 2 bytes per parameter.

Nothing here is imported before it is asked for; not verified on a GPU yet.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from copd_megatron.types import UserError

RECIPES = {"te_current": "Float8CurrentScaling", "te_blockwise": "Float8BlockScaling"}
"""``model.fp8`` -> class of ``transformer_engine.common.recipe``."""

ROWS = 16
"""Rows of an FP8 product are a multiple of this, and not none; rows of zeros fill up, and change no scale."""

HOPPER = (9, 0)


def check_machine(fp8: str, capability: tuple[int, int] | None, installed: bool) -> None:
    """Refuse a machine on which Transformer Engine's FP8 cannot run.

    Args:
        capability: of the CUDA device; None where there is none.
        installed: whether Transformer Engine can be imported.

    Raises:
        UserError: no CUDA device, one before Hopper, or no Transformer Engine.
    """
    instead = "model.fp8=frozen_rowwise runs anywhere"
    if capability is None:
        raise UserError(f"model.fp8: {fp8} without a CUDA device; Transformer Engine needs one; use a GPU; {instead}")
    if capability < HOPPER:
        raise UserError(f"model.fp8: {fp8} on a device of compute capability {capability[0]}.{capability[1]}; Hopper "
                        f"(9.0) or later is needed; use another GPU; {instead}")
    if not installed:
        raise UserError(f"model.fp8: {fp8} without Transformer Engine; it must be importable; pip install "
                        f"--no-build-isolation 'copd-megatron[te]'; {instead}")


def missing_rows(rows: int) -> int:
    """How many rows of zeros a product of this many rows lacks. Examples: 17 -> 15; 0 -> 16.

    A context rank may have no row of a pack, and fused kernels take no empty tensor.
    """
    return -rows % ROWS if rows else ROWS


class TeProduct:
    """y = W x in FP8 with this rank's shard of a frozen weight. No module: the weight belongs to the adapter linear."""

    def __init__(self, out: int, inp: int, fp8: str, config: TransformerConfig, group: ProcessGroup):
        """``group``: the tensor-parallel ranks, over which recipes that keep a history of amax reduce it."""
        import transformer_engine.pytorch as te
        from megatron.core.extensions.transformer_engine import TELinear
        from transformer_engine.common import recipe

        self.recipe, self.group, self.autocast = getattr(recipe, RECIPES[fp8])(), group, te.autocast
        # Transposed copies are made only where gradients are on.
        with torch.enable_grad(), te.quantized_model_init(enabled=True, recipe=self.recipe):
            self.linear = TELinear(inp, out, parallel_mode="duplicated", config=config, init_method=nn.init.zeros_,
                                   bias=False, skip_bias_add=False, skip_weight_param_allocation=False)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, 1, out] from [T, 1, in]; the gradient goes to x."""
        missing = missing_rows(len(x))
        with self.autocast(enabled=True, recipe=self.recipe, amax_reduction_group=self.group):
            y, _ = self.linear(F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x)
        return y[:len(x)] if missing else y


def rounds_what_is_copied(weight: Tensor) -> bool:
    """Whether this is one of Transformer Engine's quantised tensors: they quantise what is copied into them, whole."""
    return hasattr(weight, "quantize_")


def te_norm(config: TransformerConfig, size: int, eps: float) -> Any:
    """Transformer Engine's RMSNorm of vectors of this size, by Megatron's ``TENorm``."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm(config, size, eps)
