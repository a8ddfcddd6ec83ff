"""Ranks of this machine: they find each other, and what goes wrong is said once."""
from copd_megatron.launch import local


def test_a_mistake_that_all_ranks_share_is_shown_once(capfd):
    assert local.run_ranks(2, ["config", "absent.py"]) == 2
    said = capfd.readouterr().err
    assert said.count("absent.py does not exist") == 1 and "rank 1" not in said
    assert local.run_ranks(2, ["config"]) == 0
