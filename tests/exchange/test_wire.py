"""Bytes arrive as they were sent, are counted, and in debug mode no damage goes unseen."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.exchange.wire import (
    CHECKSUM_BYTES,
    LENGTH_BYTES,
    CorruptPayload,
    Wire,
    as_bytes,
    checksum,
    from_bytes,
)
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.ranks import RankError, run_ranks

SIZES = [[0, 3, 17], [5, 0, 0], [0, 8, 0]]
"""Bytes from rank i to rank j."""


def message(source, to):
    return torch.arange(SIZES[source][to], dtype=torch.uint8) + 50 * source + 7 * to


def trade(checked):
    groups = Groups.create(Layout(replicas=3), Placement.build("abc", 3))
    wire = Wire(groups.exchange, checked)
    out = [message(wire.rank, to).split([2, SIZES[wire.rank][to] - 2] if SIZES[wire.rank][to] > 1 else 1)
           for to in range(3)]  # in pieces
    sizes_in = [SIZES[source][wire.rank] for source in range(3)]
    first, second = wire.trade(out, sizes_in), wire.trade(out, sizes_in)  # two on the way at a time
    got = [first.wait(), second.wait()]
    asynchronous = wire.sent_bytes
    got.append(wire.trade_ragged(out))
    return got, asynchronous, wire.sent_bytes


@pytest.mark.parametrize("checked", [False, True])
def test_what_is_sent_arrives_and_is_counted(checked):
    for rank, (got, asynchronous, total) in enumerate(run_ranks(3, trade, checked)):
        for messages in got:
            for source, received in enumerate(messages):
                assert torch.equal(received, message(source, rank))
        leaving = sum(SIZES[rank]) - SIZES[rank][rank] + 2 * CHECKSUM_BYTES * checked
        assert asynchronous == 2 * leaving and total == 3 * leaving + 2 * LENGTH_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int32])
def test_bytes_and_back_wherever_they_lie(dtype):
    values = torch.arange(12, dtype=dtype).view(4, 3).T  # not contiguous
    flat = torch.cat([torch.zeros(3, dtype=torch.uint8), as_bytes(values)])[3:]  # not aligned
    assert torch.equal(from_bytes(flat, dtype).view(3, 4), values)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=70), st.data())
def test_any_damaged_word_torn_end_or_unwritten_buffer_shows(content, data):
    sent = torch.tensor(list(content), dtype=torch.uint8)
    reference = checksum(sent)
    assert not torch.equal(checksum(sent[:-1]), reference) or not len(sent)
    if len(sent):
        damaged = sent.clone()
        damaged[data.draw(st.integers(0, len(sent) - 1))] ^= data.draw(st.integers(1, 255))
        assert not torch.equal(checksum(damaged), reference)
    assert reference.any()  # a message of zeros, checksum included, was never written
    if len(sent) >= 16 and not torch.equal(sent[:8], sent[8:16]):
        assert not torch.equal(checksum(torch.cat([sent[8:16], sent[:8], sent[16:]])), reference)


def damaged_on_the_way(checked):
    """Rank 1's message is damaged after it was sealed."""
    groups = Groups.create(Layout(replicas=2), Placement.build("ab", 2))
    wire = Wire(groups.exchange, checked)
    under_way = wire.trade([[torch.arange(9, dtype=torch.uint8)]] * 2, [9, 9])
    under_way._work.wait()
    if wire.rank == 0:
        under_way._received[-4] ^= 1
    try:
        under_way.wait()
    except CorruptPayload as error:
        return str(error)
    return None


def test_a_corrupt_payload_is_an_error_in_debug_mode():
    corrupt, whole = run_ranks(2, damaged_on_the_way, True)
    assert "group rank 1" in corrupt and "9 bytes" in corrupt and whole is None
    assert run_ranks(2, damaged_on_the_way, False) == [None, None]


def disagree():
    groups = Groups.create(Layout(replicas=2), Placement.build("ab", 2))
    wire = Wire(groups.exchange, True)
    rank = wire.rank
    wire.trade([[], []], [0, 4] if rank == 0 else [0, 0]).wait()


def test_sizes_that_do_not_agree_are_an_error():
    with pytest.raises(RankError):
        run_ranks(2, disagree, timeout_s=10)
