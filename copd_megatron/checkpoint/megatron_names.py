"""What a backbone's tensors are called in Megatron distributed checkpoints, and what Megatron-LM must be told.

    layers        decoder.layers.<parameter>, one tensor of all layers [L, ...]: GPTModel's default
    norms         self_attention.linear_qkv.layer_norm_weight, mlp.linear_fc1.layer_norm_weight: the names that
                  Megatron's Transformer Engine spec has and its local spec maps to; of MoE layers
                  pre_mlp_layernorm.weight, as in the Transformer Engine spec
    MoE experts   mlp.experts.experts.<linear>.weight [L, E, ...], as SequentialMLP and TEGroupedMLP share them
    the rest      embedding.word_embeddings.weight, decoder.final_layernorm.weight, output_layer.weight

Layouts of fused tensors are those of ``model.translate`` on one tensor-parallel rank.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from copd_megatron.model.hf_config import load_hf_config
from copd_megatron.model.moe_weights import Storage
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import HEAD_NAME, TEXT_PREFIX, Piece, expected_shapes, layer_pieces
from copd_megatron.types import UserError

TRACKER, RELEASE, ARGUMENTS = "latest_checkpointed_iteration.txt", "release", "megatron_arguments.txt"

LAYER = "decoder.layers."
NORMS = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
         "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
"""Our parameter names -> those of Megatron's checkpoints, where they differ in dense layers."""

_MOE_EXPERT = re.compile(r"experts\.local_experts\.\d+\.")

KNOWN = frozenset({*NORMS, *(f"self_attention.{linear}.{kind}" for linear in ("linear_qkv", "linear_proj")
                             for kind in ("weight", "bias")), "self_attention.q_layernorm.weight",
                   "self_attention.k_layernorm.weight", *(f"mlp.{linear}.{kind}" for linear in
                                                          ("linear_fc1", "linear_fc2") for kind in ("weight", "bias"))})
"""Parameters of a layer that GPTModel's dense layers have too, laid out in the same way."""

STATEFUL = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
            "self_attention.q_layernorm", "self_attention.k_layernorm", "mlp.linear_fc1", "mlp.linear_fc2")
"""Modules of a layer that ask for an ``_extra_state`` object: linears in the local spec, with Transformer Engine (FP8
scales) the others too. Empty ones satisfy a strict load."""

MOE_STATEFUL = (*STATEFUL[:5], "pre_mlp_layernorm", "mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
"""Those of a MoE layer; the last two have one for each MoE expert."""

FINAL_NORM = "decoder.final_layernorm"


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor of the checkpoint, or one layer of it, made of slices of Hugging Face tensors."""

    key: str
    layer: int | None
    """Index along its first dim; None: the tensor has no layers."""
    shape: tuple[int, ...]
    """Of one layer: [rows], [rows, cols], or [moe_experts, rows, cols]."""
    pieces: list[Piece]
    """Below each other, MoE expert by MoE expert."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Its shape as the pieces lie in it, [rows] or [rows, cols]."""
        return self.shape if len(self.shape) < 3 else (self.shape[0] * self.shape[1], self.shape[2])


def check_supported(backbone: Path, spec: BackboneSpec) -> None:
    """Refuse backbones that GPTModel cannot be.

    Raises:
        UserError: a vision tower, parameters that its layers do not have, dense layers between MoE layers, or a
            rotary scaling of its own.
    """
    what, moe = None, spec.moe
    unknown = sorted(layer_pieces(spec, spec.num_layers - 1, 0, 1).keys() - KNOWN) if moe is None else []
    if spec.is_visual:
        what = "a vision tower"
    elif moe is not None and len(moe.layers) < spec.num_layers:
        what = "dense layers between its MoE layers"
    elif moe is not None and moe.norm_topk and moe.top_k == 1:
        what = "num_experts_per_tok 1 with norm_topk_prob"
    elif unknown:
        what = f"{unknown[0]} in its layers"
    elif spec.o_bias or spec.mlp_bias:
        what = "biases on o_proj or in its MLP"
    elif spec.rope.max_positions or (spec.rope.frequencies is not None and _scaling_arguments(backbone) is None):
        what = f"rotary scaling {load_hf_config(backbone).rope_parameters}"
    if what:
        raise UserError(f"--backbone: family {spec.family} has {what}; converted are text models, dense or with "
                        "MoE layers throughout, that Megatron-LM's GPTModel can be; continue from the Hugging Face "
                        "directory instead")


def slots(spec: BackboneSpec, storage: Storage | None = None) -> list[Slot]:
    """All tensors of the checkpoint, by layer, from MoE experts stored that way (None: the family's first)."""
    shapes = expected_shapes(spec, storage)
    prefix = TEXT_PREFIX[spec.family]
    tables = {"embedding.word_embeddings.weight": f"{prefix}embed_tokens.weight",
              f"{FINAL_NORM}.weight": f"{prefix}norm.weight"}
    if not spec.tied_head:
        tables["output_layer.weight"] = HEAD_NAME
    found = [Slot(key, None, shapes[name], [Piece(name)]) for key, name in tables.items()]
    for layer in range(spec.num_layers):
        stacks: dict[str, list[list[Piece]]] = {}
        for name, pieces in layer_pieces(spec, layer, 0, 1, storage=storage).items():
            stacks.setdefault(_MOE_EXPERT.sub("experts.experts.", name), []).append(pieces)
        for name, stack in stacks.items():
            rows = sum(len(piece_rows(piece, shapes)) for piece in stack[0])
            shape = (rows, *stack[0][0].matrix(shapes[stack[0][0].name])[1:])
            shape = (len(stack), *shape) if ".experts." in name else shape
            key = name if spec.is_moe(layer) and name.startswith("pre_mlp") else NORMS.get(name, name)
            found.append(Slot(LAYER + key, layer, shape, [piece for pieces in stack for piece in pieces]))
    return found


def piece_rows(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> range:
    """Rows of a piece within its matrix; ``shapes`` are those of the Hugging Face tensors."""
    return range(*piece.rows.indices(piece.matrix(shapes[piece.name])[0]))


def megatron_arguments(backbone: Path, spec: BackboneSpec, dtype: torch.dtype) -> list[str]:
    """Options of Megatron-LM's pretrain_gpt.py for this model and this checkpoint, one a line."""
    max_positions = load_hf_config(backbone).max_position_embeddings
    given = {"num-layers": spec.num_layers, "hidden-size": spec.hidden_size, "ffn-hidden-size": spec.ffn_hidden_size,
             "num-attention-heads": spec.num_heads, "group-query-attention": None,
             "num-query-groups": spec.num_kv_heads, "kv-channels": spec.head_dim,
             "max-position-embeddings": max_positions, "normalization": "RMSNorm", "norm-epsilon": spec.norm_eps,
             "swiglu": None, "disable-bias-linear": None, "position-embedding-type": "rope",
             "rotary-base": int(spec.rope.theta), "vocab-size": spec.vocab_size, "ckpt-format": "torch_dist",
             "finetune": None, "no-load-optim": None, "no-load-rng": None}
    if (moe := spec.moe) is not None:
        given |= {"num-experts": moe.experts, "moe-router-topk": moe.top_k, "moe-ffn-hidden-size": moe.ffn_hidden_size,
                  "moe-router-dtype": "fp32", "moe-token-dispatcher-type": "alltoall"}
    switches = {"moe-router-pre-softmax": moe is not None and not moe.norm_topk,
                "add-qkv-bias": spec.qkv_bias, "qk-layernorm": spec.qk_norm,
                "untie-embeddings-and-output-weights": not spec.tied_head, "bf16": dtype == torch.bfloat16,
                "fp16": dtype == torch.float16}
    given |= {name: None for name, on in switches.items() if on}
    given |= (_scaling_arguments(backbone) or {}) if spec.rope.frequencies is not None else {}
    return [f"--{name}" if value is None else f"--{name} {value}" for name, value in given.items()]


def _scaling_arguments(backbone: Path) -> dict[str, Any] | None:
    """Options that say the rotary scaling; None if Megatron-LM has none for it."""
    scaling = {name: value for name, value in load_hf_config(backbone).rope_parameters.items()
               if value is not None and name not in ("rope_theta", "type")}
    kind, factor = scaling.pop("rope_type", None), scaling.pop("factor", None)
    if kind == "linear" and not scaling and factor == int(factor):
        return {"rotary-seq-len-interpolation-factor": int(factor)}
    # RotaryEmbedding of megatron-core has these three numbers built in.
    if kind == "llama3" and scaling == {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                        "original_max_position_embeddings": 8192}:
        return {"use-rope-scaling": None, "rope-scaling-factor": factor}
    return None
