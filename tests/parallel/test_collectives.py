"""Collectives against what they must deliver, computed on one rank."""
import math

import pytest
import torch
import torch.distributed as dist

from copd_megatron.parallel import collectives
from support.ranks import run_ranks

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]


def piece(src, dst, dtype, width):
    """What ``src`` sends to ``dst``: 0 to 3 rows, telling both ranks apart."""
    rows = (2 * src + dst) % 4
    values = torch.arange(rows * width).reshape(rows, width) % 5 + 10 * src + dst
    return (values % 2 if dtype is torch.bool else values).to(dtype)


def exchange(dtype, width):
    rank, world = dist.get_rank(), dist.get_world_size()
    out = [piece(rank, peer, dtype, width) for peer in range(world)]
    received = collectives.all_to_all_ragged(out, dist.group.WORLD)
    return all(got.dtype == dtype and torch.equal(got.double(), piece(peer, rank, dtype, width).double())
               for peer, got in enumerate(received)) and len(received) == world


def exchange_everything():
    return {(str(dtype), width): exchange(dtype, width) for dtype in DTYPES for width in (1, 3)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_to_all_ragged_delivers_every_piece(world):
    for delivered in run_ranks(world, exchange_everything):
        assert all(delivered.values()), delivered


def gather():
    rank = dist.get_rank()
    mine = torch.full((rank * 2, 2), float(rank), dtype=torch.bfloat16, requires_grad=True)
    scalars = collectives.all_gather_ragged(torch.tensor([rank]), dist.group.WORLD)
    empty = collectives.all_gather_ragged(torch.zeros(0, 3), dist.group.WORLD)
    return collectives.all_gather_ragged(mine, dist.group.WORLD), scalars, empty


def test_all_gather_ragged_keeps_rank_order_and_lengths():
    for gathered, scalars, empty in run_ranks(3, gather):
        assert [tuple(t.shape) for t in gathered] == [(0, 2), (2, 2), (4, 2)]
        assert all((t == rank).all() and not t.requires_grad for rank, t in enumerate(gathered))
        assert torch.cat(scalars).tolist() == [0, 1, 2]
        assert [tuple(t.shape) for t in empty] == [(0, 3)] * 3


def objects():
    rank = dist.get_rank()
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    last_of_pair = 2 * (rank // 2) + 1
    return (collectives.broadcast_object({"from": rank}, last_of_pair, pair),
            collectives.all_gather_objects((rank, "x" * rank), pair))


def test_objects_stay_inside_their_group():
    results = run_ranks(4, objects)
    assert [sent["from"] for sent, _ in results] == [1, 1, 3, 3]
    assert results[0][1] == results[1][1] == [(0, ""), (1, "x")]
    assert results[2][1] == [(2, "xx"), (3, "xxx")]


def scalars():
    rank = dist.get_rank()
    values = {"loss": 0.1 * (rank + 1), f"only/{rank}": float(rank)}
    return [collectives.reduce_scalars(values, dist.group.WORLD, op) for op in ("sum", "max", "min")]


def test_reduce_scalars_takes_the_union_of_names():
    results = run_ranks(3, scalars)
    assert results[0] == results[1] == results[2]
    total, largest, smallest = results[0]
    assert total == {"loss": math.fsum([0.1, 0.2]) + 0.1 * 3, "only/0": 0.0, "only/1": 1.0, "only/2": 2.0}
    assert (largest["loss"], smallest["loss"]) == (0.1 * 3, 0.1)
    assert list(total) == ["loss", "only/0", "only/1", "only/2"]


def compare(differing_rank):
    values = torch.tensor([1.0, float("nan"), 0.0])
    if dist.get_rank() == differing_rank:
        values[2] = -0.0
    try:
        collectives.assert_same_on_all_ranks(values, dist.group.WORLD, "hidden states")
    except AssertionError as error:
        return str(error)


def test_bits_are_compared():
    assert run_ranks(3, compare, None) == [None] * 3
    message = "hidden states: group ranks [2] hold other bits than group rank 0"
    assert run_ranks(3, compare, 2) == [message] * 3


def test_wrong_pieces_are_refused(one_rank):
    group = one_rank("a").world
    with pytest.raises(ValueError, match="2 tensors for a group of 1"):
        collectives.all_to_all_ragged([torch.zeros(1), torch.zeros(1)], group)


def mismatched():
    with pytest.raises(ValueError, match="share dtype"):
        collectives.all_to_all_ragged([torch.zeros(1, 2), torch.zeros(1, 3)], dist.group.WORLD)
    with pytest.raises(ValueError, match="share dtype"):
        collectives.all_to_all_ragged([torch.zeros(1), torch.zeros(1).double()], dist.group.WORLD)


def test_pieces_of_different_kinds_are_refused():
    run_ranks(2, mismatched)


def test_world_of_one_returns_copies(one_rank):
    group = one_rank("a").world
    mine = torch.arange(3)
    for got in collectives.all_to_all_ragged([mine], group) + collectives.all_gather_ragged(mine, group):
        got += 1
    assert mine.tolist() == [0, 1, 2]
    assert collectives.broadcast_object("x", 0, group) == "x"
    assert collectives.reduce_scalars({"a": 1}, group) == {"a": 1.0}
