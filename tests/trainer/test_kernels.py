"""A training step with Triton's operators moves the experts as the reference does (float32, interpreted on a CPU)."""
import pytest
import torch

from support.ranks import run_ranks
from support.replay import one_step
from support.tiny_models import tiny_model
from support.toy_run import toy_config

TARGETS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
EDGES = [{"teacher": "text", "student": "image", "signal": "topk"}, ["image", "text"]]


def config_of(kernels: str, attention: str = "auto", **parallel):
    """One OPD step of two experts; not every projection has an adapter."""
    return toy_config("qwen3", ("text", "image"), parallel=parallel,
                      model={"path": str(tiny_model("qwen3", num_hidden_layers=1)), "dtype": "float32",
                             "kernels": kernels, "attention": attention},
                      adapter={"rank": 3, "alpha": 6.0, "targets": TARGETS},
                      exchange={"topology": EDGES}, opd={"topk": 4},
                      rollout={"prompts_per_step": 1, "group_size": 2, "max_completion_tokens": 3},
                      schedule={"cycles": 1, "rl_steps": 0, "opd_steps": 3}, metrics={"rollouts": False})


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return run_ranks(1, one_step, config_of("reference"), tmp_path_factory.mktemp("reference"), 1)[0]


@pytest.mark.parametrize("config", [config_of("triton"), config_of("triton", tensor=2, sequence_parallel=True),
                                    config_of("reference", attention="triton")], ids=["one rank", "TP", "attention"])
def test_gradients_equal_the_reference(config, truth, tmp_path):
    result = run_ranks(config.parallel.tensor, one_step, config, tmp_path, 1, truth["recording"], timeout_s=240)[0]
    for expert, factors in truth["gradients"].items():
        assert max(float(g.abs().max()) for g in factors.values()) > 1e-3
        for name, gradient in factors.items():
            torch.testing.assert_close(result["gradients"][expert][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
