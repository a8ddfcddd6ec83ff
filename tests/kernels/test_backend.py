"""The choice between the reference and Triton."""
import inspect

import pytest
import torch

from copd_kernels.backend import implementation, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_is_triton_on_cuda(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", CPU, torch.float32) == resolve("auto", CUDA, torch.bfloat16) == "triton"
    assert resolve("auto", CPU, torch.bfloat16) == resolve("auto", CUDA, torch.float64) == "reference"
    assert resolve("reference", CUDA, torch.float32) == "reference"


@pytest.mark.parametrize(("dtype", "why"), [(torch.float64, "float64"), (torch.float32, "CUDA device, this is cpu")])
def test_triton_is_refused_with_the_reason(dtype, why, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"triton: .*{why}.*; auto and reference"):
        resolve("triton", CPU, dtype)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert resolve("auto", CUDA, torch.float32) == "reference"
    with pytest.raises(ValueError, match="not installed"):
        resolve("triton", CUDA, torch.float32)


FUNCTIONS = {"vocab_topk": ["vocab_topk", "merge_topk"], "topk_kl": ["topk_divergence"],
             "linear_logprob": ["linear_logprob", "linear_logprob_backward", "picked_gradient", "rest_"],
             "grouped_lora": ["grouped_down", "grouped_up"], "rowwise_fp8": ["quantise_rows"]}


@pytest.mark.parametrize("kernel", FUNCTIONS)
def test_both_implementations_have_the_functions_of_the_contract(kernel):
    reference, triton = (implementation(kernel, backend) for backend in ("reference", "triton"))
    assert reference is not triton
    for name in FUNCTIONS[kernel]:
        taken, wanted = ([(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
                         for module in (triton, reference))
        assert taken == wanted, name
