"""Decode attention over shared trunks and own rows equals one plain softmax per lane."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from copd_megatron.model.shared_prefix import Leaf, LeafGroup, build_pack
from copd_megatron.rollout.kv_cache import DecodeAttention, PrefixBlock, joined_block, prefix_blocks
from support.random_backbone import make_backbone, make_prompt, one_rank_groups

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM, LAYER = 4, 2, 8, 1


def random(seed, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def block(numbers, lengths, seed):
    """A block of trunks; padding holds values that must not be seen."""
    width = max(lengths)
    kv = tuple(random(seed + i, len(lengths), KV_HEADS, width, DIM) for i in range(2))
    padding = torch.arange(width) >= torch.tensor(lengths)[:, None]
    for x in kv:
        x.masked_fill_(padding[:, None, :, None], 1e3)
    bias = torch.zeros(len(lengths), 1, 1, width, dtype=torch.float64)
    bias.masked_fill_(padding[:, None, None], float("-inf"))
    return PrefixBlock(np.array(numbers), np.array(lengths), {LAYER: kv}, bias if padding.any() else None)


LAYOUTS = {
    "no trunks": ([], [-1, -1, -1]),
    "one trunk for all": ([([0], [5])], [0, 0, 0]),
    "even": ([([0, 1], [5, 5])], [0, 0, 1, 1]),
    "interleaved": ([([0, 1], [5, 5])], [1, 0, 1, 0]),
    "padded": ([([1, 0], [16, 3])], [0, 0, 1, 1]),
    "uneven lanes": ([([0, 1, 2], [4, 4, 4])], [2, 0, 0, 1, 0]),
    "several blocks, one lane alone": ([([2, 0], [16, 7]), ([1], [50])], [1, 2, -1, 0, 0, 1]),
    "a trunk nobody needs": ([([0, 1], [5, 5]), ([2], [9])], [1, 1]),
}


def _steps(layout, backend, rows, keep_after=None):
    """Outputs of a first step of ``rows`` rows per lane and 20 single ones."""
    blocks, trunk_of_lane = LAYOUTS[layout]
    attention = DecodeAttention([block(n, lengths, 10 * i) for i, (n, lengths) in enumerate(blocks)],
                                np.array(trunk_of_lane), CPU, backend)
    lanes, outputs = np.arange(len(trunk_of_lane)), []
    for step in range(21):
        count = rows if step == 0 else 1
        attention.own.advance(count)
        q, k, v = (random(100 * step + i, len(trunk_of_lane), count, heads, DIM)[lanes].flatten(0, 1)
                   for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
        out = attention.attend(LAYER, q, k, v)
        assert out.shape == q.shape
        outputs.append(out.unflatten(0, (len(lanes), count)))
        if step == keep_after:
            kept = np.arange(len(lanes))[1::2]
            lanes = lanes[kept]
            attention.keep(kept)
    return outputs


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_softmax_per_lane(layout, rows):
    for got, want in zip(_steps(layout, "flash", rows), _steps(layout, "reference", rows)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lanes_that_stay_do_not_notice(layout, backend):
    whole, kept = _steps(layout, backend, 2), _steps(layout, backend, 2, keep_after=4)
    for step, (want, got) in enumerate(zip(whole, kept)):
        torch.testing.assert_close(got, want if step <= 4 else want[1::2], rtol=0, atol=1e-12)


def test_reference_is_plain_attention():
    """The reference itself, written out for one lane with a trunk of 5 and a first step of 3 rows."""
    trunk = block([0], [5], 0)
    attention = DecodeAttention([trunk], np.array([0]), CPU, "reference")
    attention.own.advance(3)
    q, k, v = random(1, 3, HEADS, DIM), random(2, 3, KV_HEADS, DIM), random(3, 3, KV_HEADS, DIM)
    got = attention.attend(LAYER, q, k, v)
    for row in range(3):
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            keys = torch.cat([trunk.kv[LAYER][0][0, kv], k[:row + 1, kv]])
            values = torch.cat([trunk.kv[LAYER][1][0, kv], v[:row + 1, kv]])
            weights = (keys @ q[row, head] / DIM ** 0.5).softmax(0)
            torch.testing.assert_close(got[row, head], weights @ values, rtol=0, atol=1e-13)


def test_only_the_first_step_feeds_several_rows():
    attention = DecodeAttention([], np.array([-1]), CPU)
    for _ in range(2):
        attention.own.advance(2)
        inputs = random(1, 2, HEADS, DIM), random(2, 2, KV_HEADS, DIM), random(3, 2, KV_HEADS, DIM)
        if attention.own.length > 2:
            with pytest.raises(ValueError, match="only the first step"):
                attention.attend(LAYER, *inputs)
        else:
            attention.attend(LAYER, *inputs)


@pytest.mark.parametrize("scope,first_layer", [("sequence", 0), ("sequence", 2), ("completion", 1)])
def test_blocks_hold_the_captured_rows(scope, first_layer):
    """Every trunk's K and V at every layer, from the stream of that layer; similar lengths share a block."""
    groups = one_rank_groups()
    try:
        backbone = make_backbone(groups, scope=scope, first_layer=first_layer)
        lengths = [90, 10, 30, 95, 44]
        owners = ("a", "b") if scope == "sequence" else (None,)
        lanes = [LeafGroup(make_prompt(n, n), [Leaf(owner, ()) for owner in owners]) for n in lengths]
        pack = build_pack(lanes, backbone.rules, CPU, trunks_only=True)
        capture = {}
        with torch.no_grad():
            backbone(pack, None, capture)
    finally:
        groups.destroy()
    captured = dict(capture)
    numbers = {key: number for number, key in enumerate(pack.trunk_rows)}
    blocks = prefix_blocks(pack, capture, numbers)
    assert not capture
    assert sorted(sum((b.trunks.tolist() for b in blocks), [])) == sorted(numbers.values())
    names = {number: key for key, number in numbers.items()}
    together = [sorted({lengths[names[number][0]] for number in b.trunks.tolist()}) for b in blocks]
    assert together == [[90, 95], [30, 44], [10]]
    for b in blocks:
        for i, number in enumerate(b.trunks.tolist()):
            for layer, kv in captured.items():
                rows = pack.trunk_rows[names[number]][0 if layer <= first_layer else 1]
                assert b.lengths[i] == len(rows)
                for x, stream in zip(b.kv[layer], kv):
                    assert x[i, :, :len(rows)].equal(stream[rows.start:rows.stop].transpose(0, 1))
            assert b.bias is None or (b.bias[i, 0, 0] == 0).sum() == b.lengths[i]
        # The same from trunks given one by one.
        one_by_one = [{layer: tuple(x[i, :, :b.lengths[i]].transpose(0, 1) for x in b.kv[layer]) for layer in b.kv}
                      for i in range(len(b.trunks))]
        again = joined_block(b.trunks.tolist(), one_by_one)
        assert again.trunks.tolist() == b.trunks.tolist() and again.lengths.tolist() == b.lengths.tolist()
        assert again.bias is b.bias is None or torch.equal(again.bias, b.bias)
        seen = torch.ones(1) if b.bias is None else (b.bias == 0).to(CPU)[:, :, 0, :, None]
        assert all(torch.equal(x * seen, y * seen) for n in b.kv for x, y in zip(b.kv[n], again.kv[n], strict=True))
