"""The prefix store: names tell apart all that differs, the budget holds, and what is evicted is counted.

That a hit is a miss bit for bit is shown on the engine (``test_megatron_engine``).
"""
from __future__ import annotations

import pytest
import torch

from copd_megatron.model.shared_prefix import PackRules
from copd_megatron.rollout.prefix_store import SHARED, PrefixKey, PrefixPart, PrefixStore, exactness, prefix_keys
from support.random_backbone import make_prompt

SIZE = 64
"""Bytes of `entry`."""


def key_of(name: str, how: str = SHARED, tokens: int = 4) -> PrefixKey:
    return PrefixKey(name, tokens, 0, 1, how)


def entry() -> PrefixPart:
    return PrefixPart({1: (torch.zeros(4, 1, 2), torch.zeros(4, 1, 2))})


def test_names_tell_apart_all_that_differs():
    prompt, other = make_prompt(1, 9), make_prompt(2, 9)
    sequence, later, completion = PackRules("sequence"), PackRules("sequence", 2), PackRules("completion", 2)
    name = prompt.content_hash
    assert prefix_keys(prompt, 4, sequence, "a", 7) == [PrefixKey(name, 8, 0, 4, "a@7")]
    assert prefix_keys(prompt, 4, later, "a", 7) == [PrefixKey(name, 8, 0, 2, SHARED), PrefixKey(name, 8, 2, 4, "a@7")]
    # The backbone's lower layers are the experts' lower layers.
    assert prefix_keys(prompt, 4, later, None) == [PrefixKey(name, 8, 0, 2, SHARED), PrefixKey(name, 8, 2, 4, SHARED)]
    assert prefix_keys(prompt, 4, sequence, None) == [PrefixKey(name, 8, 0, 4, SHARED)]
    assert prefix_keys(prompt, 4, completion, None) == [PrefixKey(name, 6, 0, 4, SHARED)]
    cases = [(prompt, "a", 7), (prompt, "a", 8), (prompt, "b", 7), (other, "a", 7), (make_prompt(1, 8), "a", 7)]
    assert len({tuple(prefix_keys(p, 4, sequence, e, v)) for p, e, v in cases}) == len(cases)


def test_the_least_recently_used_goes_first():
    store, keys = PrefixStore(3 * SIZE + 1, 1), [key_of(name) for name in "wxyz"]
    for key in keys[:3]:
        store.fetch(key, SIZE, entry)
    kept = store.fetch(keys[0], SIZE, pytest.fail)
    store.fetch(keys[3], SIZE, entry)
    assert [key in store for key in keys] == [True, False, True, True] and store.bytes == 3 * SIZE and len(store) == 3
    assert store.fetch(keys[0], SIZE, pytest.fail) is kept
    store.fetch(keys[1], SIZE, entry)
    counters = store.counters
    assert (counters.hits, counters.misses) == (2, 5)
    assert (counters.saved_tokens, counters.computed_tokens, counters.recomputed_tokens) == (8, 20, 4)


@pytest.mark.parametrize("budget", [0, SIZE - 1])
def test_what_is_over_the_budget_is_evaluated_each_time(budget):
    store, key = PrefixStore(budget, 1), key_of("x")
    for _ in range(3):
        assert store.fetch(key, SIZE, entry).layers.keys() == {1}
    assert (len(store), store.bytes, store.counters.recomputed_tokens) == (0, 0, 8)


def test_tokens_count_by_layers():
    store = PrefixStore(1000, 8)
    store.fetch(PrefixKey("x", 12, 0, 2, SHARED), 0, PrefixPart)
    store.fetch(PrefixKey("x", 12, 2, 8, "a@1"), 0, PrefixPart)
    store.fetch(PrefixKey("x", 12, 0, 2, SHARED), 0, PrefixPart)
    assert (store.counters.computed_tokens, store.counters.saved_tokens) == (12, 3)


def test_only_current_classes_stay():
    store = PrefixStore(5 * SIZE, 1)
    keys = [key_of("x", how) for how in (exactness("a", 1), exactness("a", 2), exactness("aa", 1), "b@1", SHARED)]
    for key in keys:
        store.fetch(key, SIZE, entry)
    store.keep_current({"a@2", "aa@1"})
    assert [key in store for key in keys] == [False, True, True, False, True] and store.bytes == 3 * SIZE
    store.fetch(keys[0], SIZE, entry)
    assert store.counters.recomputed_tokens == 0, "dropped because nobody would ask again, not for want of room"


def test_mistakes_are_noticed():
    with pytest.raises(ValueError, match="-1 bytes"):
        PrefixStore(-1, 1)
    wide = torch.zeros(100, 1, 2)
    part = PrefixPart({1: (wide[:4], wide[4:8])}, hidden=torch.zeros(4, 1, 2))
    assert part.held_bytes == wide.nbytes + 32, "a view counts with all that it holds"
    with pytest.raises(ValueError, match=r"holds 832 bytes; it was to count with 96"):
        PrefixStore(10**4, 1).fetch(key_of("x"), 96, lambda: part)
