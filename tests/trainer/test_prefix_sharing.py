"""A whole run without prefix sharing, the naive reference, trains the same experts as one with it."""
import pytest

from support.toy_run import run_steps, toy_config


@pytest.mark.parametrize("first_layer", [0, 1])
@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_sharing_changes_no_expert(scope, first_layer, tmp_path):
    results = [run_steps(toy_config(experts=("text", "image"),
                                    model={"prefix_sharing": sharing},
                                    adapter={"scope": scope, "first_layer": first_layer},
                                    rollout={"prompts_per_step": 2, "group_size": 3},
                                    metrics={"rollouts": False, "overlap_tokens": 1}), tmp_path / str(sharing))
               for sharing in (True, False)]
    shared, naive = results
    assert shared["tokens"] == naive["tokens"]
    for expert, factors in naive["adapters"].items():
        for name, factor in factors.items():
            assert (factor - shared["adapters"][expert][name]).abs().max() < 1e-8, name
    assert naive["metrics"][1]["tokens/saved_share"] == 0
    assert shared["metrics"][1]["tokens/saved_share"] > 0.3
