"""``copd doctor``: which parts are installed, whether they fit, what they are for, how to get them.

Works in any environment, also an empty one: versions are read from package metadata, and only torch is
imported, to ask for CUDA. Version ranges are those of setup.py, read from the installed metadata.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util

DISTRIBUTION = "copd-megatron"


@dataclass(frozen=True)
class Part:
    """A package the project uses. Example: ``Part("PyAV", "av", "av", "videos")``."""

    name: str
    distribution: str
    """Its name in package metadata."""
    module: str
    """Its import name."""
    purpose: str
    needed: bool = True
    """False: an extra."""


PARTS = (
    Part("torch", "torch", "torch", "all arithmetic"),
    Part("Megatron-Core", "megatron-core", "megatron.core", "layers, parallelism, checkpoints"),
    Part("transformers", "transformers", "transformers", "backbone folders, tokenizers, vision towers"),
    Part("torchvision", "torchvision", "torchvision", "image and video processors"),
    Part("safetensors", "safetensors", "safetensors", "reading and writing weights"),
    Part("PEFT", "peft", "peft", "the format of exported adapters"),
    Part("pydantic", "pydantic", "pydantic", "configuration"),
    Part("NumPy", "numpy", "numpy", "prompts, seeding"),
    Part("Pillow", "pillow", "PIL", "images"),
    Part("PyAV", "av", "av", "videos"),
    Part("math-verify", "math-verify", "math_verify", "comparing mathematical answers"),
    Part("datasets", "datasets", "datasets", "data from JSONL and Parquet"),
    Part("pyarrow", "pyarrow", "pyarrow", "rollouts on disk"),
    Part("rich", "rich", "rich", "progress display"),
    Part("matplotlib", "matplotlib", "matplotlib", "plots in reports"),
    Part("TensorBoard", "tensorboard", "tensorboard", "metrics in TensorBoard"),
    Part(
        "Transformer Engine",
        "transformer-engine",
        "transformer_engine",
        "faster layers, FP8 (CUDA only)",
        needed=False,
    ),
    Part("vLLM", "vllm", "vllm", "rollouts on vLLM", needed=False),
    Part(
        "nvidia-resiliency-ext",
        "nvidia-resiliency-ext",
        "nvidia_resiliency_ext",
        "restart after faults",
        needed=False,
    ),
    Part("W&B", "wandb", "wandb", "metrics in Weights & Biases", needed=False),
)


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    part: str
    found: str
    purpose: str
    remedy: str = ""
    """The install line; empty where nothing is to be done."""
    fine: bool = True
    """False: it is needed and missing, too old or broken, or it does harm."""


def diagnose() -> list[Finding]:
    """The state of every part, needed ones first."""
    return [_python(), *(_part(part) for part in PARTS), *_cuda(), _apex()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info[:2] >= (3, 12)
    return Finding(
        "Python", version, "megatron-core 0.17 and later need 3.12", "" if fits else "use Python 3.12", fits
    )


def _part(part: Part) -> Finding:
    requirement, wanted = _requirement(part.distribution)
    remedy = f"pip install '{requirement}'"
    needed = part.needed
    version = installed_version(part)
    if version is None:
        return Finding(part.name, "missing" if needed else "-", part.purpose, remedy, fine=not needed)
    if not _in_range(version, wanted):
        return Finding(part.name, f"{version}, not {wanted}", part.purpose, remedy, fine=False)
    if part.module == "transformer_engine" and (problem := _transformer_engine_problem()):
        return Finding(part.name, version, part.purpose, problem, fine=False)
    return Finding(part.name, version, part.purpose)


def installed_version(part: Part) -> str | None:
    """Version of an installed part, "unknown" for one without metadata, None if it is absent."""
    try:
        return metadata.version(part.distribution)
    except metadata.PackageNotFoundError:
        pass
    try:
        return "unknown" if util.find_spec(part.module) is not None else None
    except ModuleNotFoundError:  # the parent package of a dotted name is absent
        return None


def _requirement(distribution: str) -> tuple[str, str]:
    """What setup.py asks for: ("torch>=2.11", ">=2.11"); (name, "") where this package is not installed."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except (ImportError, metadata.PackageNotFoundError):
        return distribution, ""
    for requirement in requirements:
        if requirement.name.lower() == distribution:
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            return f"{requirement.name}{extras}{requirement.specifier}", str(requirement.specifier)
    return distribution, ""


def _in_range(version: str, wanted: str) -> bool:
    if not wanted or version == "unknown":
        return True
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    # Containers carry builds such as 2.11.0a0+nv26, which by the letter come before 2.11.
    return SpecifierSet(wanted).contains(Version(version).base_version)


def _cuda() -> Iterator[Finding]:
    """What torch can compute on; nothing where there is no torch."""
    purpose = "training on GPUs; without it: CPU and gloo"
    if installed_version(PARTS[0]) is None:
        return
    try:
        import torch
    except Exception as error:  # a broken installation must not stop the diagnosis
        yield Finding("CUDA", f"torch does not import: {error}", purpose, "reinstall torch", fine=False)
        return
    if not torch.cuda.is_available():
        yield Finding("CUDA", "-", purpose, "run on a machine with an NVIDIA GPU and driver")
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    devices = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("CUDA", f"{torch.version.cuda}: {devices}; NCCL {nccl}", purpose)


def _transformer_engine_problem() -> str | None:
    try:
        import torch

        from copd_megatron.optional import transformer_engine_problem
    except ImportError:
        return None
    return transformer_engine_problem(torch.cuda.is_available())


def _apex() -> Finding:
    purpose = "fused Adam and norms where Transformer Engine is absent (CUDA only)"
    if util.find_spec("apex") is None:
        return Finding(
            "NVIDIA Apex", "-", purpose, "build NVIDIA/apex from source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
        )
    from copd_megatron.optional import apex_capabilities, apex_problem

    if problem := apex_problem():
        return Finding("NVIDIA Apex", "foreign or incomplete", purpose, problem, fine=False)
    return Finding("NVIDIA Apex", ", ".join(apex_capabilities()), purpose)
