"""Keys and values of prefixes, kept within a byte budget and found again by content.

Reuse is exact or it does not happen: an entry is named by all that its bits depend on, and is what evaluating that
prefix *alone* gives (the canonical shape: a matrix product rounds differently beside other rows). So a hit equals a
miss bit for bit, provided ``compute`` keeps to that shape; the store itself never touches a number.

    name = (hash of prompt and media, layers [first, end), class)
    class = "shared"            no adapter acts on the prefix in or below these layers: every expert may use it
            "expert@version"    that expert's adapters after so many updates, and nobody else's
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from copd_megatron.model.attention import KV
from copd_megatron.model.shared_prefix import PackRules
from copd_megatron.types import Prompt

SHARED = "shared"

REMEMBERED = 100_000
"""Names of evicted entries that are kept to tell what is computed again."""

Layers = dict[int, KV]
"""1-based layer -> K, V, each [P, kv_heads, d] of this rank."""


@dataclass(frozen=True)
class PrefixKey:
    """What a prefix's keys and values depend on. Example: ``PrefixKey("9f..", 0, 14, "image@120")``."""

    content: str
    """``Prompt.content_hash``."""
    first: int
    """First layer, counted from 0."""
    end: int
    """One more than the last layer."""
    exactness: str
    """``SHARED`` or "expert@version"."""


def prefix_keys(prompt: Prompt, layers: range, rules: PackRules, expert: str | None, version: int) -> list[PrefixKey]:
    """Names of the parts of a prefix on a stage, lowest layers first: one, or two where adapters begin in between.

    Args:
        layers: of this stage, counted from 0.
        expert: whose lanes ask; None is the backbone.
        version: updates that the expert has had; a frozen policy's stays 0.
    """
    if expert is None or rules.scope == "completion":
        border = layers.stop
    else:
        border = min(max(rules.first_layer, layers.start), layers.stop)
    parts = ((layers.start, border, SHARED), (border, layers.stop, f"{expert}@{version}"))
    return [PrefixKey(prompt.content_hash, first, end, how) for first, end, how in parts if first < end]


@dataclass
class PrefixCounters:
    """What the store has done so far."""

    hits: int = 0
    misses: int = 0
    saved_tokens: int = 0
    """Prefix tokens of hits."""
    computed_tokens: int = 0
    """Prefix tokens of misses."""
    recomputed_tokens: int = 0
    """Those of them that had been there and were evicted: what a larger budget would have saved."""

    @property
    def hit_rate(self) -> float:
        """Share of requests that were hits, 0 to 1; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)


class PrefixStore:
    """Least recently used entries go first. One per rank: ranks of a replica make the same calls in the same
    order, so they hold the same names and evict alike."""

    def __init__(self, budget_bytes: int):
        """Args:
            budget_bytes: of all tensors held; 0 holds nothing.

        Raises:
            ValueError: a negative budget.
        """
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes; 0 or more")
        self.budget_bytes, self.bytes = budget_bytes, 0
        self.counters = PrefixCounters()
        self._entries: OrderedDict[PrefixKey, tuple[Layers, int]] = OrderedDict()
        self._evicted: OrderedDict[PrefixKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._entries

    def fetch(self, key: PrefixKey, tokens: int, compute: Callable[[], Layers]) -> Layers:
        """The entry of that name, evaluated by ``compute`` if it is not there. Its tensors must not be changed.

        Args:
            tokens: length of the prefix, for the counters.
            compute: evaluates this prefix alone; gives every layer of the key's range.

        Raises:
            ValueError: ``compute`` gave other layers.
        """
        if key in self._entries:
            self._entries.move_to_end(key)
            self.counters.hits += 1
            self.counters.saved_tokens += tokens
            return self._entries[key][0]
        layers = compute()
        if sorted(layers) != list(range(key.first + 1, key.end + 1)):
            raise ValueError(f"{key} got layers {sorted(layers)} (counted from 1)")
        self.counters.misses += 1
        self.counters.computed_tokens += tokens
        if key in self._evicted:
            self.counters.recomputed_tokens += tokens
        self._put(key, layers)
        return layers

    def forget(self, expert: str, version: int | None = None) -> None:
        """Drop an expert's entries of all versions but ``version``: nobody will ask for them again."""
        keep = f"{expert}@{version}"
        for key in [k for k in self._entries if _is_of(k, expert) and k.exactness != keep]:
            self._drop(key)
        for key in [k for k in self._evicted if _is_of(k, expert) and k.exactness != keep]:
            del self._evicted[key]

    def metrics(self) -> dict[str, float]:
        """Hit rate (0 to 1), bytes held, and tokens saved, computed and recomputed so far."""
        counters = self.counters
        return {"hit_rate": counters.hit_rate, "bytes": float(self.bytes),
                "saved_tokens": float(counters.saved_tokens), "computed_tokens": float(counters.computed_tokens),
                "recomputed_tokens": float(counters.recomputed_tokens)}

    def _put(self, key: PrefixKey, layers: Layers) -> None:
        """Keep an entry, unless it alone is over the budget; the least recently used make room."""
        size = _bytes([tensor for kv in layers.values() for tensor in kv])
        if size > self.budget_bytes:
            self._remember(key)
            return
        while self.bytes + size > self.budget_bytes:
            oldest = next(iter(self._entries))
            self._drop(oldest)
            self._remember(oldest)
        self._entries[key] = layers, size
        self._evicted.pop(key, None)
        self.bytes += size

    def _remember(self, key: PrefixKey) -> None:
        """That this one was here once."""
        self._evicted[key] = None
        self._evicted.move_to_end(key)
        if len(self._evicted) > REMEMBERED:
            self._evicted.popitem(last=False)

    def _drop(self, key: PrefixKey) -> None:
        self.bytes -= self._entries.pop(key)[1]


def _is_of(key: PrefixKey, expert: str) -> bool:
    return key.exactness.rpartition("@")[0] == expert


def _bytes(tensors: Sequence) -> int:
    """Memory that the tensors keep alive: a view holds all of what it looks at."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
