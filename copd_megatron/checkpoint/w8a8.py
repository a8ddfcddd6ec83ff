"""Weights in FP8 rows as vLLM and transformers read them: compressed-tensors' W8A8, format ``float-quantized``.

A linear's ``weight`` is float8_e4m3fn [out, in], ``weight_scale`` beside it float32 [out, 1], and W ~ scale * weight.
They are the very bytes that ``model.fp8=frozen_rowwise`` computes with, because both come from ``model.fp8.quantised``.
Activations are quantised per token when they are used, so they are not in the file.
"""
from __future__ import annotations

from typing import Any

from copd_kernels.rowwise_fp8.reference import ALIGNMENT
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import expected_shapes, quantised_weights
from copd_megatron.types import UserError

NOT_QUANTISED = ("re:.*lm_head$", "re:.*visual\\..*", "re:.*mlp\\.gate$", "re:.*mlp\\.experts\\..*")
"""Linears that stay as they are, by patterns that fit the module names of transformers and of vLLM alike: head, vision
tower, routers and MoE experts."""


def rounded_weights(spec: BackboneSpec) -> frozenset[str]:
    """Names of the weights that are kept in FP8 rows.

    Raises:
        UserError: one has sizes that FP8 products cannot take.
    """
    shapes = expected_shapes(spec)
    names = quantised_weights(spec)
    for name in sorted(names):
        if any(size % ALIGNMENT for size in shapes[name]):
            raise UserError(f"fp8_rowwise: {name} is {list(shapes[name])}; FP8 products need multiples of {ALIGNMENT}; "
                            "keep this backbone unquantised")
    return names


def quantization_config() -> dict[str, Any]:
    """What config.json says about them (compressed-tensors 0.15 and later, ``QuantizationConfig``)."""
    numbers = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    return {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "weights": {**numbers, "strategy": "channel", "dynamic": False},
            "input_activations": {**numbers, "strategy": "token", "dynamic": True},
            "output_activations": None}},
        "ignore": list(NOT_QUANTISED), "kv_cache_scheme": None, "global_compression_ratio": None}
