"""Rows are shared out completely, evenly, and every gather can be undone."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.model.row_share import WHOLE, RowLayout, RowShare, local_slices, pieces_of


def _shares(context, sequence):
    return [RowShare(context, c, sequence, s) for c in range(context) for s in range(sequence)]


def _layout(lengths, share):
    parts, start = [], 0
    for length in lengths:
        parts.append(range(start, start + share.padded(length)))
        start = parts[-1].stop
    return RowLayout(tuple(parts), share)


SIZES = dict(context=st.integers(1, 4), sequence=st.integers(1, 3), lengths=st.lists(st.integers(1, 40), min_size=1,
                                                                                     max_size=2))


@settings(deadline=None)
@given(**SIZES)
def test_every_row_is_on_one_rank_and_gathers_find_it(context, sequence, lengths):
    layouts = [_layout(lengths, share) for share in _shares(context, sequence)]
    gathered = np.concatenate([layout.mine() for layout in layouts])
    assert sorted(gathered) == list(range(layouts[0].rows))
    assert len({len(layout.mine()) for layout in layouts}) == 1
    for layout in layouts:
        assert np.array_equal(gathered[layout.gathered_places()], np.arange(layout.rows))
        of_context = np.concatenate([layout.of_context(part) for part in layout.parts])
        assert sorted(of_context) == sorted(layout.by_sequence())
        for part, whole, shard in zip(layout.parts, local_slices(layout, False), local_slices(layout, True)):
            assert np.array_equal(of_context[whole], layout.of_context(part))
            pieces = np.split(layout.of_context(part), sequence)
            assert np.array_equal(layout.mine()[shard], pieces[layout.share.sequence_rank])
            if context > 1:
                keys = np.concatenate([layout.of_context(part, c) for c in range(context)])
                assert np.array_equal(keys[layout.key_order(part)], np.arange(part.start, part.stop))


@settings(deadline=None)
@given(**SIZES, data=st.data())
def test_wanted_rows_come_together(context, sequence, lengths, data):
    layouts = [_layout(lengths, share) for share in _shares(context, sequence)]
    wanted = np.array(data.draw(st.lists(st.integers(0, sum(lengths) - 1), unique=True)), np.int64)
    parts, orders = zip(*(layout.share_out(wanted) for layout in layouts))
    assert len({len(part) for part in parts}) == 1
    gathered = np.concatenate([layout.mine()[part] for layout, part in zip(layouts, parts)])
    for order in orders:
        assert np.array_equal(gathered if order is None else gathered[order], wanted)


@pytest.mark.parametrize("context", [2, 3, 4])
def test_causal_attention_costs_all_ranks_the_same(context):
    part = range(24 * context)
    costs = {sum(row for chunk in RowShare(context, rank).chunks(part) for row in chunk) for rank in range(context)}
    assert len(costs) == 1


def test_pieces_are_what_the_chunks_hold():
    assert pieces_of(3, 11, [range(2, 6), range(10, 14)]) == [(1, 4, 3), (4, 5, 10)]
    assert pieces_of(6, 10, [range(2, 6), range(10, 14)]) == []
    assert pieces_of(0, 5, WHOLE.chunks(range(8))) == [(0, 5, 0)]
