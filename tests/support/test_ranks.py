"""The multi-rank harness itself: results by rank, tracebacks, deaths, hangs, and parents that have groups."""
import os
import time

import pytest
import torch
import torch.distributed as dist

from support.ranks import RankError, run_ranks


def test_results_come_back_by_rank_from_a_closure():
    offset = 10

    def work(scale, *, shift):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
        return dist.get_rank() * scale + offset + shift, total

    results = run_ranks(3, work, 2, shift=1)
    assert [number for number, _ in results] == [11, 13, 15]
    assert all(total.item() == 3.0 for _, total in results)


def test_ranks_share_seed_and_own_one_thread():
    def work():
        return torch.get_num_threads(), torch.rand(2).tolist(), os.getpid()

    (threads, drawn, pid), other = run_ranks(2, work)
    assert threads == 1
    assert drawn == other[1]
    assert len({pid, other[2], os.getpid()}) == 3


def test_traceback_of_the_failing_rank_is_raised_and_the_others_end():
    def work():
        if dist.get_rank() == 1:
            raise ValueError("one is broken")
        dist.barrier()
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*in work.*ValueError: one is broken"):
        run_ranks(2, work)
    assert time.monotonic() - started < 20


def test_death_is_reported():
    def work():
        if dist.get_rank() == 0:
            os._exit(7)
        time.sleep(60)

    with pytest.raises(RankError, match="rank 0 died with exit code 7"):
        run_ranks(2, work)


def test_hang_is_reported_with_its_place():
    def never_returns():
        if dist.get_rank() == 1:
            time.sleep(60)

    with pytest.raises(RankError, match=r"(?s)did not return in time.*rank 1:.*in never_returns"):
        run_ranks(2, never_returns, timeout_s=1.5)


def test_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises(RankError, match="rank 0 failed"):
        run_ranks(1, lambda: (lambda: None))


def test_parent_with_groups_of_its_own_may_run_ranks(one_rank):
    groups = one_rank("a", "b")

    def work():
        total = torch.ones(1)
        dist.all_reduce(total)
        return dist.get_world_size(), total.item()

    assert run_ranks(2, work) == [(2, 2.0), (2, 2.0)]
    total = torch.ones(1)
    dist.all_reduce(total, group=groups.adapter["b"])
    assert total.item() == 1.0
