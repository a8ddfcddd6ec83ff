"""Megatron's transformer layer as we use it: frozen, with adapter linears and the pack's attention.

The only file that knows how Megatron-Core spells a layer; another stack (HybridModel's, Transformer
Engine's) would be built here.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from copd_kernels.backend import Backend
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.adapter_linear import AdapterGateUpLinear, AdapterQKVLinear, AdapterRowLinear
from copd_megatron.model.attention import PackCoreAttention
from copd_megatron.model.fp8 import hold_in_fp8, hold_in_te
from copd_megatron.model.moe_layer import FrozenExperts, FrozenMoE, FrozenRouter, Product, moe_options
from copd_megatron.model.norms import RMSNorm, again
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.te import RECIPES
from copd_megatron.optional import Maker
from copd_megatron.parallel.groups import Groups


class SwiGluMLP(MLP):
    """fc2(silu(gate) * up) with gate, up = fc1(x) (Shazeer 2020, arXiv:2002.05202)."""

    recompute = False

    def forward(self, hidden_states, per_token_scale=None, **_):
        """[T, 1, H] and no bias, from [T, 1, H]."""
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        return self.linear_fc2(again(_swiglu, inner) if self.recompute else _swiglu(inner))


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _with_bias(linear: type[nn.Module], bias: bool) -> Callable[..., nn.Module]:
    """Builds the linear with or without bias; Megatron's configuration has one switch for all of them."""
    return lambda *args, **kwargs: linear(*args, **kwargs | {"bias": bias})


def transformer_config(spec: BackboneSpec, groups: Groups, dtype: torch.dtype,
                       norms: Maker = "torch") -> TransformerConfig:
    """Megatron's configuration of the backbone's layers under this layout; ``norms`` as in ``build_layer``."""
    layout = groups.layout
    return TransformerConfig(
        num_layers=spec.num_layers, hidden_size=spec.hidden_size, ffn_hidden_size=spec.ffn_hidden_size,
        # With fewer key/value heads than ranks Megatron would gather q, k, v of all ranks in every layer; to it,
        # copies of a head are heads of their own.
        num_attention_heads=spec.num_heads, num_query_groups=spec.kv_groups(layout.tp), kv_channels=spec.head_dim,
        normalization="RMSNorm", layernorm_epsilon=spec.norm_eps, qk_layernorm=spec.qk_norm,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        # Context parallelism stays out of it: its layers see this rank's rows, and attention is ours.
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        # Microbatches have different lengths; Megatron wants this dispatcher then, for dense models too.
        variable_seq_lengths=True, moe_token_dispatcher_type="alltoall",
        # Losses come out of our own reduction; the schedule must not scale them.
        calculate_per_token_loss=True,
        perform_initialization=False, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, bias_activation_fusion=False, masked_softmax_fusion=False,
        # Transformer Engine rotates without YaRN's factor.
        apply_rope_fusion=norms == "te" and spec.rope.attention_factor == 1,
        persist_layer_norm=False, **moe_options(spec, layout))


def build_layer(spec: BackboneSpec, config: TransformerConfig, groups: Groups, bank: AdapterBank,
                index: int, recompute: bool = False, kernels: Backend = "reference",
                fp8: str = "none", experts: Product = "reference", norms: Maker = "torch") -> TransformerLayer:
    """Layer ``index`` (global, 0-based) with its linears connected to the bank.

    Args:
        recompute: norms and activations are computed again in the backward.
        kernels: what adds the adapters.
        fp8: how the linears' weights are kept.
        experts: what multiplies MoE experts.
        norms: who computes norms.
    """
    made = partial(RMSNorm, maker=norms)
    norm = made if spec.qk_norm else IdentityOp
    submodules = TransformerLayerSubmodules(
        input_layernorm=made,
        self_attention=ModuleSpec(
            module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=AdapterQKVLinear, core_attention=PackCoreAttention,
                linear_proj=_with_bias(AdapterRowLinear, spec.o_bias), q_layernorm=norm, k_layernorm=norm)),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=made,
        mlp=_moe_builder(spec, bank, experts, fp8, kernels) if spec.is_moe(index) else partial(
            SwiGluMLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=_with_bias(AdapterGateUpLinear, spec.mlp_bias),
                                     linear_fc2=_with_bias(AdapterRowLinear, spec.mlp_bias))),
        mlp_bda=get_bias_dropout_add)
    layer = TransformerLayer(config, submodules, layer_number=index + 1, pg_collection=groups.pg_collection,
                             add_layer_offset=False)
    for module in layer.modules():
        if isinstance(module, (RMSNorm, SwiGluMLP, FrozenExperts)):
            module.recompute = recompute
    attention, tp = layer.self_attention, groups.layout.tp
    # Megatron computes it from options of YaRN alone; it multiplies rotated queries and keys.
    attention._yarn_concentration_factor = spec.rope.attention_factor
    linears = [(attention.linear_qkv, "qkv", ("q_proj", "k_proj", "v_proj")),
               (attention.linear_proj, "proj", ("o_proj",))]
    if not spec.is_moe(index):
        linears += [(layer.mlp.linear_fc1, "fc1", ("gate_proj", "up_proj")),
                    (layer.mlp.linear_fc2, "fc2", ("down_proj",))]
    for linear, name, parts in linears:
        linear.attach(parts, bank.routing, bank.lora_of(index, name), kernels)
        if fp8 == "frozen_rowwise":
            hold_in_fp8(linear, f"{name} of layer {index}")
        elif fp8 in RECIPES:
            hold_in_te(linear, f"{name} of layer {index}", fp8, config, groups.tp)
    attention.linear_qkv.attach_heads(spec.num_heads // tp, spec.kv_groups(tp) // tp, spec.head_dim)
    return layer.requires_grad_(False)


def _moe_builder(spec: BackboneSpec, bank: AdapterBank, product: Product, fp8: str,
                 kernels: Backend) -> Callable[..., FrozenMoE]:
    """What Megatron calls to make the MLP of a MoE layer."""
    experts = partial(FrozenExperts, product=product, fp8=fp8, kernels=kernels)
    submodules = MoESubmodules(experts=experts, router=FrozenRouter)
    return partial(FrozenMoE, submodules=submodules, routing=bank.routing, norm_topk=spec.moe.norm_topk)
