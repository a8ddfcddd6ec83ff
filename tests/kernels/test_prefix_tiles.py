"""Work lists of the Triton form: every query meets every key that it sees exactly once, in both directions."""
import numpy as np
import pytest
import torch

from copd_kernels.prefix_attention import tiles
from copd_kernels.prefix_attention.plan import Plan, Span

CPU = torch.device("cpu")


def _random_stream(rng) -> tuple[list[Span], int]:
    """Trunks of up to 40 rows, then leaves of up to 25 in any order, some without a trunk, with gaps between."""
    spans, at = [], 0
    for length in rng.integers(0, 41, 3):
        spans.append((at, at + int(length), 0, 0))
        at += int(length) + int(rng.integers(0, 2)) * 3
    trunks = [(0, 0), *((start, stop) for start, stop, *_ in spans)]
    for length in rng.integers(0, 26, 9):
        spans.append((at, at + int(length), *trunks[rng.integers(len(trunks))]))
        at += int(length)
    return [Span(*span) for span in spans], at


def _of_a_rank(spans: list[Span], tokens: int) -> tuple[list[Span], int]:
    """What a context rank has that holds two chunks of the stream's rows."""
    chunks, pieces, at = (range(tokens // 5, tokens // 3), range(tokens // 2, tokens - 4)), [], 0
    for chunk in chunks:
        for span in spans:
            low, high = max(span.start, chunk.start), min(span.stop, chunk.stop)
            if low < high:
                row = at + low - chunk.start
                pieces.append(Span(row, row + high - low, span.trunk_start, span.trunk_stop, span.start, low))
        at += len(chunk)
    return pieces, at


def _seen(pieces: list[Span], rows: int, keys: int) -> np.ndarray:
    """[rows, keys, 2] by definition: keys seen as the row's own, and as its trunk's."""
    seen = np.zeros((rows, keys, 2), int)
    for piece in pieces:
        first, stop = piece.keys
        for n in range(piece.length):
            seen[piece.start + n, first:stop - piece.length + n + 1, 0] = 1
            seen[piece.start + n, piece.trunk_start:piece.trunk_stop, 1] = 1
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_every_pair_meets_once(seed, monkeypatch):
    monkeypatch.setattr(tiles, "MOST_ROWS", 17)
    spans, tokens = _random_stream(np.random.default_rng(seed))
    for pieces, rows in ((spans, tokens), _of_a_rank(spans, tokens)):
        plan, want = Plan.build(pieces, rows, CPU), _seen(pieces, rows, tokens)
        by_query = tiles.query_tiles(plan, 8)
        bounds, key = by_query.bounds.numpy(), np.arange(tokens)
        inside = (key >= bounds[:, :1]) & (key < bounds[:, 1:])
        got = np.zeros_like(want)
        for row, stop, trunk_start, trunk_stop, own, dense, end in by_query.tiles.tolist():
            assert 0 < stop - row <= 8 and own <= dense <= end
            got[row:stop, trunk_start:trunk_stop, 1] += 1
            got[row:stop, own:dense, 0] += 1
            got[row:stop, dense:end, 0] += inside[row:stop, dense:end]
        np.testing.assert_array_equal(got, want)
        for trunks in (True, False):
            by_key = tiles.key_tiles(plan, 16, trunks)
            runs, got, slots = by_key.runs.tolist(), np.zeros(want.shape[:2], int), []
            for start, stop, a, b, c, slot in by_key.items.tolist():
                assert 0 < stop - start <= 16 and sum(y - x for x, y in runs[b:c]) <= 17
                slots += [(slot, start, stop)] if slot >= 0 else []
                for low, high in runs[a:b]:
                    got[low:high, start:stop] += inside[low:high, start:stop]
                for low, high in runs[b:c]:
                    got[low:high, start:stop] += 1
            np.testing.assert_array_equal(got, want.sum(2) if trunks else want[..., 0])
            shared = [(first + n, start, stop) for start, stop, first, count in by_key.sums.tolist()
                      for n in range(count)]
            assert sorted(slots) == shared and by_key.slots == len(shared)


def test_leaves_of_a_trunk_that_lie_together_share_tiles():
    spans = [(0, 50, 0, 0), *((at, at + 2, 0, 50) for at in range(50, 82, 2))]
    table = tiles.query_tiles(Plan.build(spans, 82, CPU), 16).tiles
    assert len(table) == 4 + 2, "four of the trunk, two for sixteen leaves"


def test_a_long_span_keeps_its_tiles_to_itself():
    table = tiles.query_tiles(Plan.build([(0, 100, 0, 0), (100, 104, 0, 0)], 104, CPU), 16).tiles.tolist()
    assert {tuple(tile[4:]) for tile in table if tile[0] >= 100} == {(100, 101, 104)}
