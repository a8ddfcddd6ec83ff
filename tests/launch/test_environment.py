"""Environment variables: defaults give way to the user, the rank is torchrun's."""

import pytest

from copd_megatron.launch import environment


def test_defaults_are_set_and_give_way(monkeypatch):
    for name in environment.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    environment.set_defaults()
    assert environment.os.environ["HF_HUB_OFFLINE"] == "1"
    assert environment.os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"


@pytest.mark.parametrize(("value", "rank"), [(None, 0), ("0", 0), ("5", 5)])
def test_rank(monkeypatch, value, rank):
    monkeypatch.delenv("RANK", raising=False)
    if value is not None:
        monkeypatch.setenv("RANK", value)
    assert environment.rank() == rank
    assert environment.is_first_rank() is (rank == 0)
