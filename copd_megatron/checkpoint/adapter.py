"""Policies as LoRA factors outside a bank, and what can be made of them: exact sums, and truncations with their error.

Factors are read or computed when they are asked for, so that combining adapters takes the memory of one weight's.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from copd_megatron.config.trainer import MergeConfig
from copd_megatron.model.adapter_bank import concatenated_factor
from copd_megatron.types import UserError


@dataclass(frozen=True, eq=False)
class Adapter:
    """One policy: W + scaling B A on every weight that has factors.

    Example: ``Adapter({"layers.3.mlp.up_proj.lora_A": A, "layers.3.mlp.up_proj.lora_B": B}, 1.0)``.
    """

    factors: Mapping[str, Tensor]
    """Full factors by name, A [r, in] and B [out, r], in layer order."""
    scaling: float
    invocation_token_ids: tuple[int, ...] | None = None
    """Where it begins to act, of an activated LoRA (scope ``completion``); None acts on every token."""

    def modules(self) -> list[str]:
        """The weights with factors: "layers.3.mlp.up_proj"."""
        return [name.removesuffix(".lora_A") for name in self.factors if name.endswith(".lora_A")]

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """A and B of one weight."""
        return self.factors[f"{module}.lora_A"], self.factors[f"{module}.lora_B"]


class Factors(Mapping[str, Tensor]):
    """Factors that ``get`` makes anew whenever they are asked for."""

    def __init__(self, names: Sequence[str], get: Callable[[str], Tensor]):
        self._names, self._get = dict.fromkeys(names), get

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def factors_in(file: Path, names: Mapping[str, str]) -> Factors:
    """Factors in a safetensors file; ``names``: factor -> tensor. Opened for each, so that nothing stays mapped."""
    def get(name: str) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(names[name]).clone()

    return Factors(list(names), get)


def merge_weights(experts: Sequence[str], config: MergeConfig) -> dict[str, float]:
    """Expert -> factor of its delta under ``config.rule``.

    Raises:
        UserError: ``weighted`` without a weight for each of them.
    """
    if config.rule == "weighted":
        if set(config.weights) != set(experts):
            raise UserError(f"merge.weights: {config.weights}; rule weighted needs one weight for each of "
                            f"{', '.join(experts)} and no other; correct it")
        return {expert: config.weights[expert] for expert in experts}
    factor = {"uniform": 1 / len(experts), "task_arithmetic": config.scale, "concat": 1.0}[config.rule]
    return dict.fromkeys(experts, factor)


def combined(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The adapter whose delta is sum_i weights[i] * delta_i, exactly: ranks are concatenated, scaling is 1.

    They need not adapt the same weights.

    Raises:
        UserError: they do not begin to act at the same tokens.
    """
    starts = {adapter.invocation_token_ids for adapter in adapters}
    if len(starts) > 1:
        raise UserError(f"adapters: they begin to act at {sorted(map(str, starts))}; only adapters with the same "
                        "invocation tokens (None: plain LoRA) add up; combine those of one adapter.scope")
    names = dict.fromkeys(name for adapter in adapters for name in adapter.factors)

    def get(name: str) -> Tensor:
        return concatenated_factor(name, [(adapter.factors[name], weight * adapter.scaling)
                                          for adapter, weight in zip(adapters, weights) if name in adapter.factors])

    return Adapter(Factors(sorted(names, key=lambda name: int(name.split(".")[1])), get), 1.0, starts.pop())


class Truncation:
    """An adapter cut to a smaller rank: per weight the nearest one in the Frobenius norm (Eckart and Young 1936).

    With B = Q_b R_b and A^T = Q_a R_a the singular values of B A are those of R_b R_a^T, which has the size of the
    ranks; nothing of a weight's size but the factors is ever made. ``error`` knows the weights that were asked for.
    """

    def __init__(self, adapter: Adapter, rank: int):
        self.rank, self._source = rank, adapter
        self.adapter = Adapter(Factors(list(adapter.factors), self._get), 1.0, adapter.invocation_token_ids)
        self._squares: dict[str, tuple[float, float]] = {}
        self._last: tuple[str, dict[str, Tensor]] | None = None

    def error(self) -> tuple[float, float, str]:
        """|delta - truncated| / |delta| over all weights, the same of the worst weight, and its name."""
        lost, whole = (sum(squares) for squares in zip(*self._squares.values()))
        ratios = {module: (part / total) ** 0.5 if total else 0.0 for module, (part, total) in self._squares.items()}
        worst = max(ratios, key=ratios.__getitem__)
        return (lost / whole) ** 0.5 if whole else 0.0, ratios[worst], worst

    def _get(self, name: str) -> Tensor:
        module, factor = name.rsplit(".", 1)
        if self._last is None or self._last[0] != module:
            self._last = module, self._cut(module)
        return self._last[1][factor]

    def _cut(self, module: str) -> dict[str, Tensor]:
        a, b = (factor.double() for factor in self._source.pair(module))
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(self._source.scaling * r_b @ r_a.T)
        squares = s.square()
        self._squares[module] = float(squares[self.rank:].sum()), float(squares.sum())
        root = s[:self.rank].sqrt()
        return {"lora_A": (root[:, None] * vh[:self.rank] @ q_a.T).float(),
                "lora_B": (q_b @ u[:, :self.rank] * root).float()}
