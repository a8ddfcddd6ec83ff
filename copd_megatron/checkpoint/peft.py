"""Policies as PEFT adapter folders: LoRA for scope ``sequence``, activated LoRA for scope ``completion``.

A folder holds adapter_config.json and adapter_model.safetensors with full (unsharded) factors under Hugging
Face names; ``peft.PeftModel.from_pretrained(model, folder)`` loads it. Activated LoRA: Greenewald et al.
2025, arXiv:2504.12397; PEFT adapts from the last invocation tokens of the input on, as scope ``completion``
does.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from copd_megatron.checkpoint.adapter import Adapter, factors_in
from copd_megatron.checkpoint.whole_folder import whole_folder
from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.adapter_bank import MODULE_OF, AdapterBank, factor_shape
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import TEXT_PREFIX
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.types import UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

NEUTRAL = {
    "alora_invocation_tokens", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}
"""Options of a PEFT config that are read here or do not change what a finished adapter computes."""

PLAIN_VALUES = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal")}
"""Values of other options that leave a LoRA plain; initialisations such as PiSSA change the backbone.
Whatever is named neither here nor in NEUTRAL must be off: None, False or empty."""

_FACTOR = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)\.lora_[AB]")


def full_factors(bank: AdapterBank, policy: str) -> dict[str, Tensor]:
    """Copies of the unsharded factors of a policy by name, on the CPU: A [r, in], B [out, r], in layer order.

    Every rank of a replica calls it; complete on ranks with tp 0, empty on the others.
    """
    groups, own = bank.groups, {}
    for name, parameter in bank.parameters_of(policy).items():
        data = parameter.detach()
        if parameter.cut is not None and groups.layout.tp > 1:
            shards = [torch.empty_like(data) for _ in range(groups.layout.tp)]
            dist.all_gather(shards, data, group=groups.tp)
            data = torch.cat(shards[::parameter.cut.copies], parameter.cut.dim)
        own[name] = data.to("cpu", copy=True)  # the policy trains on
    if groups.coords.tp > 0:
        return {}
    found = {name: factor for stage in all_gather_objects(own, groups.pp) for name, factor in stage.items()}
    # A stage with several chunks has layers below and above those of the others.
    return dict(sorted(found.items(), key=lambda item: int(_FACTOR.fullmatch(item[0])[1])))


def save_peft_adapter(folder: Path, adapter: Adapter, prefix: str, backbone: Path) -> None:
    """Write a PEFT folder, whole or not at all. One rank calls it.

    PEFT knows one rank for all weights: smaller ones are filled up with zeros, which changes nothing.

    Args:
        adapter: full factors, see ``full_factors``.
        prefix: what precedes "layers." in the backbone's weight names, see ``translate.TEXT_PREFIX``.
        backbone: its directory, noted for readers that load it by themselves.

    Raises:
        UserError: the disk refuses.
    """
    factors = dict(adapter.factors)
    rank = max(factors[f"{module}.lora_A"].shape[0] for module in adapter.modules())
    tensors = {f"base_model.model.{prefix}{name}.weight": _of_rank(name, factor, rank)
               for name, factor in factors.items()}
    config = _config(adapter, rank, backbone)
    with whole_folder(folder, "the adapter") as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})


def _of_rank(name: str, factor: Tensor, rank: int) -> Tensor:
    missing = rank - factor.shape[0 if name.endswith("A") else 1]
    padding = (0, 0, 0, missing) if name.endswith("A") else (0, missing)
    return (torch.nn.functional.pad(factor, padding) if missing else factor).contiguous()


def _config(adapter: Adapter, rank: int, backbone: Path) -> dict[str, Any]:
    """What adapter_config.json says. Only what differs from PEFT's defaults and what readers look for: older
    versions stop at options that they do not know."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(backbone),
              "inference_mode": True, "r": rank, "lora_alpha": _alpha(adapter.scaling, rank), "lora_dropout": 0.0,
              "bias": "none", **_places(adapter.modules())}
    if adapter.invocation_token_ids is not None:
        config["alora_invocation_tokens"] = list(adapter.invocation_token_ids)
    return config


def _places(modules: Sequence[str]) -> dict[str, Any]:
    """The weights by PEFT's options: projections times layers, or, where that would be too many, one by one."""
    projections = sorted({module.split(".")[3] for module in modules})
    layers = sorted({int(module.split(".")[1]) for module in modules})
    if len(projections) * len(layers) == len(modules):
        return {"target_modules": projections, "layers_to_transform": layers, "layers_pattern": "layers"}
    return {"target_modules": sorted(modules)}


def _alpha(scaling: float, rank: int) -> int | float:
    """alpha with alpha / rank = scaling: the round number that was meant, where rounding has blurred it."""
    exact = scaling * rank
    meant = float(f"{exact:.12g}")
    alpha = meant if meant / rank == scaling else exact
    return int(alpha) if alpha.is_integer() else alpha


def read_peft_adapter(folder: Path, spec: BackboneSpec) -> Adapter:
    """A PEFT LoRA folder as a policy on the backbone of ``spec``; its factors are read when they are asked for.

    Raises:
        UserError: files are missing or broken, an option that our adapters do not have, factors that do not
            fit the backbone.
    """
    where = f"adapter {folder}"
    config = _read_config(folder, where)
    _check_options(config, where)
    prefix, names = f"base_model.model.{TEXT_PREFIX[spec.family]}", {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for name in file.keys():
                factor = name.removeprefix(prefix).removesuffix(".weight")
                _check_factor(spec, factor, file.get_tensor(name), config["r"], where)
                names[factor] = name
    except (OSError, SafetensorError) as error:
        raise _unreadable(where, error) from error
    if not names:
        raise UserError(f"{where}: {WEIGHTS} is empty; a LoRA has factors; save the adapter anew")
    for name in names:
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in names:
            raise UserError(f"{where}: has {name} but not {other}; both are needed; save the adapter anew")
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tokens = config.get("alora_invocation_tokens")
    ordered = {name: names[name] for name in sorted(names, key=_layer_order)}
    return Adapter(factors_in(folder / WEIGHTS, ordered), scaling, tuple(tokens) if tokens else None)


def _layer_order(name: str) -> tuple[int, int, str]:
    """Layers, within them projections as a new expert has them, A before B."""
    _, layer, _, projection, factor = name.split(".")
    return int(layer), list(MODULE_OF).index(projection), factor


def load_peft_adapter(bank: AdapterBank, slot: str, folder: Path,
                      invocation_token_ids: Sequence[int] | None = None) -> None:
    """Put a PEFT LoRA folder into the bank as a frozen policy. Every rank calls it and reads the folder.

    Args:
        invocation_token_ids: the generation header; if given, an activated LoRA must start there too.

    Raises:
        UserError: as ``read_peft_adapter``, or the adapter section has no place for it. The same on every rank.
    """
    adapter = read_peft_adapter(folder, bank.spec)
    check_section(adapter, bank.config, invocation_token_ids, f"adapter {folder}")
    own = {name: bank.shard(name, adapter.factors[name]) for name in bank.factor_names() if name in adapter.factors}
    bank.put(slot, own, adapter.scaling)


def _read_config(folder: Path, where: str) -> dict[str, Any]:
    """adapter_config.json."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(where, error) from error
    sizes = isinstance(config, dict) and [config.get("r"), config.get("lora_alpha")]
    if not sizes or not all(isinstance(size, int | float) and size > 0 for size in sizes):
        raise UserError(f"{where}: {CONFIG} lacks r or lora_alpha; both are positive numbers; save the "
                        "adapter anew")
    return config


def _unreadable(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: cannot be read ({error}); a PEFT folder holds {CONFIG} and {WEIGHTS}; check the path")


def _check_options(config: Mapping[str, Any], where: str) -> None:
    """Refuse whatever makes an adapter compute something else than W x + scaling B A x."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {config.get('peft_type')!r}; allowed is 'LORA'; train or convert "
                        "it to LoRA")
    for option, value in config.items():
        plain = value in PLAIN_VALUES[option] if option in PLAIN_VALUES else not value
        if option not in NEUTRAL and not plain:
            allowed = " or ".join(map(repr, PLAIN_VALUES.get(option, ("nothing",))))
            raise UserError(f"{where}: {option} is {value!r}; allowed is {allowed}; export a plain LoRA")


def check_section(adapter: Adapter, config: AdapterConfig, invocation_token_ids: Sequence[int] | None,
                  where: str) -> None:
    """Refuse an adapter that section ``adapter`` of a run has no place for.

    Plain LoRA belongs to scope sequence, activated LoRA with our invocation tokens to scope completion.
    """
    tokens = adapter.invocation_token_ids
    if bool(tokens) != (config.scope == "completion"):
        kind = "an activated" if tokens else "a plain"
        raise UserError(f"{where}: {kind} LoRA under adapter.scope={config.scope}; scope sequence reads plain LoRA, "
                        "scope completion activated LoRA; change adapter.scope or the adapter")
    if tokens and invocation_token_ids is not None and tokens != tuple(invocation_token_ids):
        raise UserError(f"{where}: alora_invocation_tokens {list(tokens)}; the backbone's chat template starts "
                        f"answers with {list(invocation_token_ids)}; use an adapter for this template")
    for module in adapter.modules():
        _, layer, _, projection = module.split(".")
        if projection not in config.targets:
            raise UserError(f"{where}: adapts {projection}, which adapter.targets leaves out; allowed are "
                            f"{', '.join(config.targets)}; add it to adapter.targets")
        if int(layer) < config.first_layer:
            raise UserError(f"{where}: adapts layer {layer}; allowed are layers from adapter.first_layer="
                            f"{config.first_layer} on; lower adapter.first_layer")


def _check_factor(spec: BackboneSpec, name: str, factor: Tensor, rank: int, where: str) -> None:
    """Refuse a factor that the backbone has no place for."""
    match = _FACTOR.fullmatch(name)
    found = match and MODULE_OF.get(match[3]) == match[2] and int(match[1]) < spec.num_layers
    if not found or not spec.has_linear(int(match[1]), match[3]):
        raise UserError(f"{where}: tensor {name!r} belongs to no linear of the backbone (family "
                        f"{spec.family}, {spec.num_layers} layers); adapter and backbone must belong "
                        "together; check both paths")
    shape = factor_shape(spec, name, rank)
    if tuple(factor.shape) != shape:
        raise UserError(f"{where}: {name} is {list(factor.shape)}; the backbone and r={rank} need "
                        f"{list(shape)}; check that adapter and backbone belong together")
    if not factor.is_floating_point() or not bool(torch.isfinite(factor).all()):
        raise UserError(f"{where}: {name} holds NaN, infinity or integers; finite floats are needed; save the "
                        "adapter anew")
