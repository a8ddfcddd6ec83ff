"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) by plain torch, Transformer Engine or NVIDIA Apex.

The definition is torch's: x / rms(x) in float32 or wider, rounded once before the weight, as Hugging Face does. The
fused ones round after the weight: they may differ from it by a unit in the last place. Megatron's local spec has a
torch norm, too, but it refuses sequence parallelism.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from copd_megatron.model.te import te_norm
from copd_megatron.optional import Maker


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, maker: Maker = "torch", **_):
        super().__init__()
        self.eps, self.recompute, self.maker = eps, False, maker
        if maker == "te":
            fused = te_norm(config, hidden_size, eps)
            self.weight = fused.weight
            self._te: tuple[nn.Module, ...] = (fused,)  # in a tuple, so that the weight has one name
            return
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype,
                                              device=torch.cuda.current_device()))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        return again(self._norm, x) if self.recompute else self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x  # prompts that are only prefilled score no token, and fused kernels take no empty tensor
        if self.maker == "te":
            return self._te[0](x)
        if self.maker == "apex":
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine

            return fused_rms_norm_affine(x, self.weight, self.weight.shape, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of which the backward keeps x only."""
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
