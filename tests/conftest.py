"""Shared by all tests: one thread, the CPU shim before Megatron, Triton on the CPU.

Where CUDA is visible only the tests marked gpu run: the others fork ranks, which CUDA does not survive, and compare
bits with those of a CPU. ``tools/run_tests.sh`` runs first these and then those. Those marked interpreted belong to
both: a kernel in Triton's interpreter, and on the device.
"""
import torch

torch.set_num_threads(1)  # before any kernel runs: forked ranks would hang on the parent's OpenMP threads

if not torch.cuda.is_available():
    from support.triton_interpreter import install

    install()  # before any kernel is imported

import pytest  # noqa: E402

import copd_megatron.platform  # noqa: E402, F401


def pytest_configure(config: pytest.Config) -> None:
    """Notices of other packages at import, which pytest would show although the platform drops them."""
    for silenced in (*(f"ignore:{notice}" for notice in copd_megatron.platform.NOTICES),
                     "ignore::DeprecationWarning:torch.*", "ignore::DeprecationWarning:megatron.*"):
        config.addinivalue_line("filterwarnings", silenced)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cuda = torch.cuda.is_available()
    for item in items:
        if cuda and item.get_closest_marker("interpreted"):
            item.add_marker("gpu")
    skip = pytest.mark.skip(reason="a CPU's test: CUDA_VISIBLE_DEVICES='' pytest" if cuda else "no CUDA device")
    for item in items:
        if (item.get_closest_marker("gpu") is not None) != cuda:
            item.add_marker(skip)


@pytest.fixture
def one_rank():
    """Makes `Groups` of one rank in this process for the named experts; drops them after the test."""
    from copd_megatron.parallel.groups import Groups
    from copd_megatron.parallel.layout import Layout
    from copd_megatron.parallel.placement import Placement

    made: list[Groups] = []

    def make(*experts: str) -> Groups:
        made.append(Groups.create(Layout(), Placement.build(experts or ("only",), 1)))
        return made[-1]

    yield make
    for groups in made:
        groups.destroy()


@pytest.fixture
def no_world():
    """For what needs a process without torch.distributed: ends the world of one that other tests may have left."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
