"""Policies as PEFT adapter folders: LoRA for scope ``sequence``, activated LoRA for scope ``completion``.

A folder holds adapter_config.json and adapter_model.safetensors with full (unsharded) factors under Hugging
Face names; ``peft.PeftModel.from_pretrained(model, folder)`` loads it.
"""
from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.types import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN = {"use_dora": False, "bias": "none", "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {},
         "modules_to_save": None, "lora_bias": False, "trainable_token_indices": None, "target_parameters": None}
"""Options of a PEFT config that an adapter here cannot express unless they have these values."""


def full_factors(bank: AdapterBank, policy: str) -> dict[str, Tensor]:
    """Unsharded factors of a policy by name, on the CPU; the same on every rank of the replica.

    Every rank of a replica calls it.
    """
    groups, own = bank.groups, {}
    for name, parameter in bank.parameters_of(policy).items():
        data = parameter.detach()
        if parameter.tp_dim is not None and groups.layout.tp > 1:
            shards = [torch.empty_like(data) for _ in range(groups.layout.tp)]
            dist.all_gather(shards, data.contiguous(), group=groups.tp)
            data = torch.cat(shards, parameter.tp_dim)
        own[name] = data.cpu()
    if groups.layout.pp == 1:
        return own
    return {name: factor for stage in all_gather_objects(own, groups.pp) for name, factor in stage.items()}


def save_peft_adapter(folder: Path, factors: Mapping[str, Tensor], scaling: float, bank: AdapterBank,
                      base_model: Path, invocation_token_ids: tuple[int, ...] | None) -> None:
    """Write a PEFT folder, whole or not at all. One rank calls it.

    Args:
        factors: full factors by name, see ``full_factors``.
        scaling: of the policy; becomes lora_alpha / r.
        invocation_token_ids: the generation header for scope ``completion``; None for plain LoRA.
    """
    from peft import LoraConfig

    prefix = TEXT_PREFIX[bank.spec.family]
    rank = next(f.shape[0] for name, f in factors.items() if name.endswith("lora_A"))
    modules = "|".join(sorted({name.rsplit(".", 2)[1] for name in factors}))
    config = LoraConfig(
        r=rank, lora_alpha=rank * scaling, task_type="CAUSAL_LM", base_model_name_or_path=str(base_model),
        inference_mode=True, target_modules=rf"{prefix.replace('.', chr(92) + '.')}layers\.({_layers(factors)})\..*\.({modules})",
        alora_invocation_tokens=list(invocation_token_ids) if invocation_token_ids is not None else None)
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        config.save_pretrained(partial)
        save_file({f"base_model.model.{prefix}{name}.weight": f.contiguous() for name, f in factors.items()},
                  partial / WEIGHTS, metadata={"format": "pt"})
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: the adapter could not be written ({error}); free space or mend the disk; "
                        "nothing was left half-written") from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _layers(factors: Mapping[str, Tensor]) -> str:
    return "|".join(str(i) for i in sorted({int(name.split(".")[1]) for name in factors}))


def load_peft_adapter(bank: AdapterBank, slot: str, folder: Path) -> None:
    """Put a PEFT LoRA folder into the bank as a frozen policy.

    Raises:
        UserError: files are missing or broken, an option that our adapters do not have, factors that do not fit.
    """
    where = f"adapter {folder}"
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise UserError(f"{where}: cannot be read ({error}); a PEFT folder holds {CONFIG} and {WEIGHTS}; "
                        "check the path") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r}; allowed is LORA; convert it")
    for option, plain in PLAIN.items():
        if config.get(option, plain) not in (plain, None, False, {}, []):
            raise UserError(f"{where}: {option} is {config[option]!r}; allowed is {plain!r}; export a plain LoRA")
    activated = bool(config.get("alora_invocation_tokens"))
    if activated != (bank.config.scope == "completion"):
        raise UserError(f"{where}: {'an activated' if activated else 'a plain'} LoRA under adapter.scope="
                        f"{bank.config.scope}; scope sequence reads plain LoRA, scope completion activated LoRA; "
                        "change adapter.scope or the adapter")
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank ** 0.5 if config.get("use_rslora") else rank)
    prefix = f"base_model.model.{TEXT_PREFIX[bank.spec.family]}"
    factors = {name.removeprefix(prefix).removesuffix(".weight"): t for name, t in tensors.items()}
    expected = {name for name in bank.factor_names()}
    for name, factor in factors.items():
        if not name.startswith("layers.") or not 0 <= int(name.split(".")[1]) < bank.spec.num_layers:
            raise UserError(f"{where}: tensor {name!r} belongs to no layer of the backbone; check base and adapter")
        if tuple(factor.shape) != bank.full_shape(name, rank):
            raise UserError(f"{where}: {name} is {tuple(factor.shape)}; the backbone needs "
                            f"{bank.full_shape(name, rank)}; check that both belong together")
        if int(name.split(".")[1]) in bank.layers and name not in expected:
            raise UserError(f"{where}: adapts {name}, which adapter.targets leaves out; add it to adapter.targets")
    outside = [n for n in factors if int(n.split(".")[1]) < bank.config.first_layer]
    if outside:
        raise UserError(f"{where}: adapts layer {outside[0].split('.')[1]}, below adapter.first_layer="
                        f"{bank.config.first_layer}; lower adapter.first_layer")
    own = {name: bank.shard(name, factor) for name, factor in factors.items() if name in expected}
    bank.put(slot, own, scaling)
