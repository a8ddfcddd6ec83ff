"""A Qwen3 text model in forty lines of plain float64 torch, one sequence at a time: the reference of trainer tests.

Shares nothing with the package: no packs, no caches, no Megatron, weights read by transformers' names.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu


class PlainModel:
    """The backbone in ``folder`` with the adapters that each call brings."""

    def __init__(self, folder: Path, scaling: float = 1.0):
        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("model."): tensor.double() for name, tensor in tensors.items()}
        self.scaling = scaling

    def logprobs(self, prompt: Sequence[int], completion: Sequence[int], factors: Mapping[str, Tensor] | None = None,
                 temperature: float = 1.0, adapted_from: int = 0) -> Tensor:
        """[R, V] log-softmax before each completion token.

        ``factors``: "layers.0.mlp.up_proj.lora_A" -> tensor, as ``AdapterBank.parameters_of`` names them; tokens
        from ``adapted_from`` on are adapted.
        """
        ids = torch.tensor([*prompt, *completion])
        hidden = self.weights["embed_tokens.weight"][ids]
        adapted = (torch.arange(len(ids)) >= adapted_from).double()[:, None]
        for layer in range(self.config["num_hidden_layers"]):
            hidden = self._layer(f"layers.{layer}", hidden, factors or {}, adapted)
        hidden = self._norm(hidden, "norm.weight")[len(prompt) - 1:-1]
        return (hidden @ self.weights["lm_head.weight"].T / temperature).log_softmax(1)

    def _layer(self, name: str, hidden: Tensor, factors: Mapping[str, Tensor], adapted: Tensor) -> Tensor:
        def linear(inputs: Tensor, projection: str) -> Tensor:
            key = f"{name}.{projection}"
            out = inputs @ self.weights[f"{key}.weight"].T
            if f"{key}.lora_A" in factors:
                out = out + adapted * self.scaling * (inputs @ factors[f"{key}.lora_A"].T @ factors[f"{key}.lora_B"].T)
            return out

        x, width = self._norm(hidden, f"{name}.input_layernorm.weight"), self.config["head_dim"]
        q, k, v = (linear(x, f"self_attn.{p}_proj").unflatten(1, (-1, width)).transpose(0, 1) for p in "qkv")
        q = self._rotate(self._norm(q, f"{name}.self_attn.q_norm.weight"))
        k = self._rotate(self._norm(k, f"{name}.self_attn.k_norm.weight"))
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) * width ** -0.5
        causal = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        mixed = scores.masked_fill(~causal, float("-inf")).softmax(2) @ v
        hidden = hidden + linear(mixed.transpose(0, 1).flatten(1), "self_attn.o_proj")
        x = self._norm(hidden, f"{name}.post_attention_layernorm.weight")
        return hidden + linear(silu(linear(x, "mlp.gate_proj")) * linear(x, "mlp.up_proj"), "mlp.down_proj")

    def _norm(self, x: Tensor, weight: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt() * self.weights[weight]

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary embedding of [heads, T, width], halves rotated against each other (Su et al. 2021). Angles are
        float32, as wherever such checkpoints run."""
        half = x.shape[2] // 2
        frequencies = 1.0 / self.config["rope_parameters"]["rope_theta"] ** (torch.arange(half).float() / half)
        angles = torch.arange(x.shape[1]).float()[:, None] * frequencies
        cos, sin, a, b = angles.cos().double(), angles.sin().double(), x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
