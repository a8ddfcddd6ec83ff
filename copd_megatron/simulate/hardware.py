"""What a rank's machine can do: the numbers that turn operations and bytes into seconds and fits.

Peaks are data sheets' (dense, no sparsity); ``achieved`` is the share of them that the trainer's own shapes are
assumed to reach. ``copd calibrate`` replaces both by what it measures and writes them as hardware.json.
"""
from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copd_megatron.types import UserError

DTYPES = ("float64", "float32", "bfloat16")
"""Compute types of a backbone, by their names in ``model.dtype``."""


@dataclass(frozen=True)
class Hardware:
    """One kind of rank. Example: ``BUILT_IN["h100"]``."""

    name: str
    memory_bytes: float
    """Memory of one rank's device that a process can allocate."""
    peak_flops: Mapping[str, float]
    """FLOP/s of a dense matrix product per dtype name."""
    achieved: Mapping[str, float]
    """Share of ``peak_flops`` that the matrix products of a layer reach, in (0, 1]."""
    memory_bandwidth: float
    """Bytes per second of the rank's own memory, as a copy loop reaches it."""
    intra_node_bandwidth: float
    """Bytes per second that a rank sends to ranks of its own node, in a collective over them."""
    inter_node_bandwidth: float
    """Bytes per second that a rank sends to ranks of other nodes."""
    intra_node_latency_s: float
    """Seconds of an empty collective within a node."""
    inter_node_latency_s: float
    """Seconds of an empty collective across nodes."""
    ranks_per_node: int
    attention_achieved: float = 0.4
    """Share of ``peak_flops`` that attention reaches."""
    operation_s: float = 5e-6
    """Seconds to launch one operation of an eager program; counts where operations are small (decoding)."""
    usable: float = 0.92
    """Share of ``memory_bytes`` to plan with: contexts, communication buffers and fragmentation take the rest."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Where numbers come from, for people."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bandwidth", "intra_node_bandwidth", "inter_node_bandwidth"):
            _check(name, getattr(self, name), "above 0", _is_number(getattr(self, name)) and getattr(self, name) > 0)
        for name in ("intra_node_latency_s", "inter_node_latency_s", "operation_s"):
            _check(name, getattr(self, name), "0 or more", _is_number(getattr(self, name)) and getattr(self, name) >= 0)
        for name, value in (("usable", self.usable), ("attention_achieved", self.attention_achieved),
                            *((f"achieved.{dtype}", share) for dtype, share in self.achieved.items())):
            _check(name, value, "above 0, at most 1", _is_number(value) and 0 < value <= 1)
        for dtype, value in self.peak_flops.items():
            _check(f"peak_flops.{dtype}", value, "above 0", _is_number(value) and value > 0)
        _check("ranks_per_node", self.ranks_per_node, "1 or more",
               isinstance(self.ranks_per_node, int) and self.ranks_per_node >= 1)

    @property
    def usable_bytes(self) -> float:
        """Bytes to plan with."""
        return self.usable * self.memory_bytes

    def flops(self, dtype: str) -> float:
        """FLOP/s that matrix products reach.

        Raises:
            UserError: nothing is known of this dtype.
        """
        if dtype not in self.peak_flops:
            raise UserError(f"model.dtype: {dtype}; {self.name} has FLOP/s of {', '.join(sorted(self.peak_flops))}; "
                            "run copd calibrate on it, or choose one of these")
        return self.peak_flops[dtype] * self.achieved.get(dtype, 0.5)

    def bandwidth(self, within_node: bool) -> float:
        """Bytes per second that a rank sends in a collective."""
        return self.intra_node_bandwidth if within_node else self.inter_node_bandwidth

    def latency_s(self, within_node: bool) -> float:
        """Seconds of an empty collective."""
        return self.intra_node_latency_s if within_node else self.inter_node_latency_s

    def to_json(self) -> str:
        """As ``load`` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(field_name: str, value: Any, allowed: str, good: bool) -> None:
    if not good:
        raise UserError(f"hardware.{field_name}: {value!r}; allowed is {allowed}; correct the file, or run copd "
                        "calibrate again")


def _gpu(name: str, memory: float, bf16: float, fp32: float, fp64: float, bandwidth: float, nvlink: float,
         network: float) -> Hardware:
    """An SXM card in nodes of eight; ``nvlink`` and ``network`` in bytes per second and direction."""
    return Hardware(
        name, memory, {"bfloat16": bf16, "float32": fp32, "float64": fp64},
        {"bfloat16": 0.55, "float32": 0.7, "float64": 0.7}, 0.85 * bandwidth, 0.75 * nvlink, 0.8 * network,
        15e-6, 30e-6, 8,
        notes={"peak_flops": "data sheet, dense; float32 without TF32", "achieved": "assumed, not measured",
               "bandwidths": "data sheet x 0.85 (memory), 0.75 (NVLink), 0.8 (network); one network card per rank"})


BUILT_IN: dict[str, Hardware] = {
    "h100": _gpu("h100", 80e9, 989e12, 67e12, 67e12, 3.35e12, 450e9, 50e9),
    "h200": _gpu("h200", 141e9, 989e12, 67e12, 67e12, 4.8e12, 450e9, 50e9),
    "a100": _gpu("a100", 80e9, 312e12, 19.5e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "cpu": Hardware("cpu", 8e9, {"bfloat16": 3e10, "float32": 5e10, "float64": 2.5e10},
                    {"bfloat16": 0.5, "float32": 0.5, "float64": 0.5}, 8e9, 1e9, 1e9, 3e-4, 5e-4, 2,
                    notes={"all": "one core of an ordinary server with 8 GB; copd calibrate knows better"}),
}
"""Hardware by name."""

REQUIRED = tuple(f.name for f in dataclasses.fields(Hardware)
                 if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)


def load_hardware(name_or_file: str) -> Hardware:
    """A built-in by name, or what ``copd calibrate`` wrote.

    Raises:
        UserError: no such name or file, or a file that is damaged or misses a field.
    """
    if name_or_file in BUILT_IN:
        return BUILT_IN[name_or_file]
    file = Path(name_or_file)
    if not file.is_file():
        near = difflib.get_close_matches(name_or_file.lower(), BUILT_IN, 1, 0.4)
        raise UserError(f"--hardware: {name_or_file!r} is neither built in nor a file; built in are "
                        f"{', '.join(BUILT_IN)}; {f'did you mean {near[0]}? ' if near else ''}copd calibrate writes a "
                        "file for the machine it runs on")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--hardware: {file} is no JSON ({error}); a file that copd calibrate wrote is needed; "
                        "run it again") from error
    if not isinstance(content, dict):
        raise UserError(f"--hardware: {file} holds a {type(content).__name__}; a JSON object is needed; run copd "
                        "calibrate again")
    known = {f.name for f in dataclasses.fields(Hardware)}
    wrong = sorted(set(content) - known) or [name for name in REQUIRED if name not in content]
    if wrong:
        raise UserError(f"--hardware: {file}: {wrong[0]!r} is {'unknown' if wrong[0] in content else 'missing'}; "
                        f"fields are {', '.join(sorted(known))}; correct the file")
    for name in ("peak_flops", "achieved"):
        if not isinstance(content[name], dict) or not content[name]:
            raise UserError(f"--hardware: {file}: {name} is {content[name]!r}; an object dtype -> number is needed; "
                            "correct the file")
    return Hardware(**content)
