"""The prefix store: a hit is a miss bit for bit, names tell apart all that differs, the budget holds."""
from __future__ import annotations

import pytest
import torch

from copd_megatron.model.shared_prefix import Leaf, LeafGroup, PackRules, build_pack
from copd_megatron.rollout.prefix_store import SHARED, PrefixKey, PrefixStore, prefix_keys
from support.random_backbone import make_backbone, make_prompt, one_rank_groups

CPU = torch.device("cpu")


@pytest.fixture
def groups():
    made = one_rank_groups()
    yield made
    made.destroy()


@torch.no_grad()
def evaluate(backbone, prompt, owner):
    """Layer -> K, V of one prefix alone, as the store wants it."""
    capture = {}
    rules = PackRules(backbone.rules.scope, backbone.rules.first_layer)
    pack = build_pack([LeafGroup(prompt, [Leaf(owner, ())])], rules, CPU, trunks_only=True)
    backbone(pack, None, capture)
    return capture


def fetch(store, backbone, prompt, expert, version=0):
    """All layers of a prefix, through the store; a part that is missing is cut from an evaluation of all."""
    layers = {}
    for key in prefix_keys(prompt, backbone.layer_range, backbone.rules, expert, version):
        layers |= store.fetch(key, len(prompt.token_ids), lambda key=key: {
            n: tuple(x.clone() for x in kv) for n, kv in evaluate(backbone, prompt, expert).items()
            if key.first < n <= key.end})
    return layers


def same_bits(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for n in one for a, b in zip(one[n], other[n]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope, first_layer", [("sequence", 0), ("sequence", 2), ("completion", 0)])
def test_a_hit_is_a_miss_bit_for_bit(groups, scope, first_layer, dtype):
    """From memory, evaluated anew, or put together from what another expert left: always the same numbers."""
    backbone = make_backbone(groups, scope=scope, first_layer=first_layer, dtype=dtype)
    prompts = [make_prompt(seed, length) for seed, length in ((1, 9), (2, 17), (3, 30))]
    store = PrefixStore(1 << 20)
    for _ in range(2):
        for prompt in prompts:
            for expert in ("a", "b"):
                assert same_bits(fetch(store, backbone, prompt, expert), evaluate(backbone, prompt, expert))
    shared = scope == "completion" or first_layer > 0
    own = scope == "sequence"
    assert store.counters.misses == len(prompts) * (shared + 2 * own)
    assert store.counters.hits == 2 * 2 * len(prompts) * (shared + own) - store.counters.misses


def test_an_evicted_prefix_comes_back_the_same(groups):
    backbone = make_backbone(groups, dtype="float32")
    prompts = [make_prompt(seed, 12) for seed in range(4)]
    size = sum(x.nbytes for kv in evaluate(backbone, prompts[0], "a").values() for x in kv)
    store = PrefixStore(2 * size + size // 2)
    for prompt in prompts + prompts[:2]:
        assert same_bits(fetch(store, backbone, prompt, "a"), evaluate(backbone, prompt, "a"))
        assert store.bytes <= store.budget_bytes
    assert store.metrics() == {"hit_rate": 0.0, "bytes": 2.0 * size, "saved_tokens": 0.0, "computed_tokens": 72.0,
                               "recomputed_tokens": 24.0}


def test_names_tell_apart_all_that_differs():
    prompt, other = make_prompt(1, 9), make_prompt(2, 9)
    sequence, later, completion = PackRules("sequence"), PackRules("sequence", 2), PackRules("completion", 2)
    name = prompt.content_hash
    assert prefix_keys(prompt, range(4), sequence, "a", 7) == [PrefixKey(name, 0, 4, "a@7")]
    assert prefix_keys(prompt, range(4), later, "a", 7) == [PrefixKey(name, 0, 2, SHARED), PrefixKey(name, 2, 4, "a@7")]
    assert prefix_keys(prompt, range(2), later, "a", 7) == [PrefixKey(name, 0, 2, SHARED)]
    assert prefix_keys(prompt, range(2, 4), later, "a", 7) == [PrefixKey(name, 2, 4, "a@7")]
    for rules, expert in ((completion, "a"), (sequence, None)):
        assert prefix_keys(prompt, range(4), rules, expert, 7) == [PrefixKey(name, 0, 4, SHARED)]
    cases = [(prompt, "a", 7), (prompt, "a", 8), (prompt, "b", 7), (other, "a", 7)]
    assert len({tuple(prefix_keys(p, range(4), sequence, e, v)) for p, e, v in cases}) == len(cases)


def entry(*layers, rows=4):
    return {n: (torch.zeros(rows, 1, 2), torch.zeros(rows, 1, 2)) for n in layers}


def test_the_least_recently_used_goes_first():
    store, keys = PrefixStore(3 * 64), [PrefixKey(name, 0, 1, SHARED) for name in "wxyz"]
    for key in keys[:3]:
        store.fetch(key, 4, lambda: entry(1))
    store.fetch(keys[0], 4, pytest.fail)
    store.fetch(keys[3], 4, lambda: entry(1))
    assert [key in store for key in keys] == [True, False, True, True] and store.bytes == 192 and len(store) == 3


@pytest.mark.parametrize("budget", [0, 63])
def test_what_is_over_the_budget_is_evaluated_each_time(budget):
    store, key = PrefixStore(budget), PrefixKey("x", 0, 1, SHARED)
    for _ in range(3):
        assert store.fetch(key, 4, lambda: entry(1)).keys() == {1}
    assert (len(store), store.bytes, store.counters.recomputed_tokens) == (0, 0, 8)


def test_old_versions_are_forgotten():
    store = PrefixStore(1 << 20)
    keys = [PrefixKey("x", 0, 1, how) for how in ("a@1", "a@2", "aa@1", "b@1", SHARED)]
    for key in keys:
        store.fetch(key, 4, lambda: entry(1))
    store.forget("a", 2)
    assert [key in store for key in keys] == [False, True, True, True, True]
    store.forget("b")
    assert [key in store for key in keys] == [False, True, True, False, True] and store.bytes == 3 * 64


def test_a_view_counts_with_all_that_it_holds():
    store, wide = PrefixStore(1 << 20), torch.zeros(100, 1, 2)
    store.fetch(PrefixKey("x", 0, 1, SHARED), 4, lambda: {1: (wide[:4], wide[4:8])})
    assert store.bytes == wide.nbytes


def test_mistakes_are_noticed():
    with pytest.raises(ValueError, match="-1 bytes"):
        PrefixStore(-1)
    for layers in ((1,), (1, 2), (2, 3, 4)):
        with pytest.raises(ValueError, match="got layers"):
            PrefixStore(100).fetch(PrefixKey("x", 1, 3, SHARED), 4, lambda layers=layers: entry(*layers))
