"""Weights in FP8 rows as vLLM and transformers read them: compressed-tensors' W8A8, format ``float-quantized``.

A linear's ``weight`` is float8_e4m3fn [out, in], ``weight_scale`` beside it float32 [out, 1], and W ~ scale * weight.
They are the very bytes that ``model.fp8=frozen_rowwise`` computes with, because both come from ``model.fp8.quantised``.
Activations are quantised per token when they are used, so they are not in the file.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from copd_kernels.rowwise_fp8.reference import ALIGNMENT
from copd_megatron.checkpoint.weight_stream import Matrices
from copd_megatron.model.safetensor_reader import SafetensorReader
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import expected_shapes, stored_as
from copd_megatron.types import UserError

NOT_QUANTISED = ("re:.*lm_head$", "re:.*visual\\..*", "re:.*mlp\\.gate$")
"""Linears that stay as they are, by patterns that fit the module names of transformers and of vLLM alike: head, vision
tower and routers."""


def rounded_weights(backbone: Path, spec: BackboneSpec) -> dict[str, Matrices]:
    """The tensors of a backbone that become FP8 rows, and what each becomes: of stacked MoE experts one matrix each, as
    both libraries want them.

    Raises:
        UserError: one has sizes that FP8 products cannot take.
    """
    with SafetensorReader(backbone) as reader:
        storage = stored_as(spec, reader)
    found = {}
    for name, shape in expected_shapes(spec, storage).items():
        stack = re.fullmatch(r"(.*\.experts\.)(gate_up|down)_proj", name)
        if not (stack or name.endswith("_proj.weight")):
            continue
        turned = stack is not None and storage == "transposed"
        parts = stack[2].split("_") if stack else ()
        rows, width = shape[:-3:-1] if turned else shape[-2:]
        if rows // (len(parts) or 1) % ALIGNMENT or width % ALIGNMENT:
            raise UserError(f"fp8_rowwise: {name} is {list(shape)}; FP8 products need multiples of {ALIGNMENT}; keep "
                            "this backbone unquantised")
        found[name] = Matrices(tuple(f"{stack[1]}{number}.{part}_proj.weight" for number in range(shape[0])
                                     for part in parts), turned) if stack else Matrices()
    return found


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
