"""Keys and values of prefixes, kept within a byte budget and found again by content.

Reuse is exact or it does not happen: an entry is named by all that its bits depend on, and is what evaluating that
prefix *alone* gives (the canonical shape: a matrix product rounds differently beside other rows). So a hit equals a
miss bit for bit, provided ``compute`` keeps to that shape; the store itself never touches a number.

    name = (hash of prompt and media, tokens of the prefix, layers [first, end), class)
    class = "shared"            no adapter acts on the prefix in or below these layers: every expert may use it
            "expert@version"    that expert's adapters as they were then, and nobody else's

Layers are those of the whole backbone: a pipeline stage keeps its own of them, so that all stages find, miss and
evict the same names.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from copd_megatron.model.attention import KV
from copd_megatron.model.shared_prefix import PackRules
from copd_megatron.types import Prompt

SHARED = "shared"

REMEMBERED = 100_000
"""Names of evicted entries that are kept to tell what is computed again."""


@dataclass(frozen=True)
class PrefixKey:
    """What a prefix's keys and values depend on. Example: ``PrefixKey("9f..", 250, 0, 14, "image@120")``."""

    content: str
    """``Prompt.content_hash``."""
    tokens: int
    """Of the prefix: the prompt without the tokens that its completions start with."""
    first: int
    """First layer, counted from 0."""
    end: int
    """One more than the last layer."""
    exactness: str
    """``SHARED`` or "expert@version"."""


@dataclass(frozen=True, eq=False)
class PrefixPart:
    """A prefix in some layers, as far as this pipeline stage has them. Its tensors must not be changed."""

    layers: Mapping[int, KV] = field(default_factory=dict)
    """1-based layer -> K, V, each [P, kv_heads, d] of this rank."""
    hidden: Tensor | None = None
    """[P, 1, H] hidden states that leave the last of the layers; only where the next layers are evaluated from
    them."""

    @property
    def held_bytes(self) -> int:
        """Memory that the tensors keep alive: a view holds all of what it looks at."""
        tensors = [tensor for kv in self.layers.values() for tensor in kv]
        if self.hidden is not None:
            tensors.append(self.hidden)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def exactness(policy: str, version: int) -> str:
    """The class of what a policy's adapters acted on; ``version``: ``AdapterBank.version_of`` of the policy."""
    return f"{policy}@{version}"


def prefix_keys(prompt: Prompt, layers: int, rules: PackRules, owner: str | None, version: int = 0) -> list[PrefixKey]:
    """Names of the parts of a prefix, lowest layers first: one, or two where adapters begin in between.

    Args:
        layers: of the backbone.
        owner: whose adapters act on the prefix, None for nobody's (``rollout.lanes.trunk_owner``).
        version: of the owner's weights.
    """
    border = rules.first_layer if rules.scope == "sequence" else 0
    how = SHARED if owner is None else exactness(owner, version)
    tokens = len(prompt.token_ids) - rules.forced(prompt)
    parts = ((0, border, SHARED), (border, layers, how))
    return [PrefixKey(prompt.content_hash, tokens, *part) for part in parts if part[0] < part[1]]


@dataclass
class PrefixCounters:
    """What the store has done so far. Tokens count by layers: a prefix of which half the layers were found counts
    half."""

    hits: int = 0
    misses: int = 0
    saved_tokens: float = 0.0
    """Prefix tokens of hits."""
    computed_tokens: float = 0.0
    """Prefix tokens of misses."""
    recomputed_tokens: float = 0.0
    """Those of them that had been there and were evicted: what a larger budget would have saved."""


class PrefixStore:
    """Least recently used entries go first. One per rank: ranks of a replica make the same calls in the same
    order, so they hold the same names and evict alike."""

    def __init__(self, budget_bytes: int, layers: int):
        """Args:
            budget_bytes: of all tensors held; 0 holds nothing.
            layers: of the backbone.

        Raises:
            ValueError: a negative budget.
        """
        if budget_bytes < 0:
            raise ValueError(f"a budget of {budget_bytes} bytes; 0 or more")
        self.budget_bytes, self.layers, self.bytes = budget_bytes, layers, 0
        self.counters = PrefixCounters()
        self._entries: OrderedDict[PrefixKey, tuple[PrefixPart, int]] = OrderedDict()
        self._evicted: OrderedDict[PrefixKey, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: PrefixKey) -> bool:
        return key in self._entries

    def fetch(self, key: PrefixKey, size: int, compute: Callable[[], PrefixPart]) -> PrefixPart:
        """The entry of that name, evaluated by ``compute`` if it is not there.

        Args:
            size: bytes that it counts with, the same on all ranks of a replica: those of the rank that holds most.
            compute: evaluates this prefix alone.

        Raises:
            ValueError: ``compute`` gave something that holds more.
        """
        counters, tokens = self.counters, key.tokens * (key.end - key.first) / self.layers
        if key in self._entries:
            self._entries.move_to_end(key)
            counters.hits += 1
            counters.saved_tokens += tokens
            return self._entries[key][0]
        part = compute()
        if part.held_bytes > size:
            raise ValueError(f"{key} holds {part.held_bytes} bytes; it was to count with {size}")
        counters.misses += 1
        counters.computed_tokens += tokens
        if key in self._evicted:
            counters.recomputed_tokens += tokens
        self._put(key, part, size)
        return part

    def keep_current(self, current: Collection[str]) -> None:
        """Drop what no policy will ask for again: all classes but ``SHARED`` and those of ``current``."""
        for names in (self._entries, self._evicted):
            for key in [k for k in names if k.exactness != SHARED and k.exactness not in current]:
                self.bytes -= self._entries[key][1] if names is self._entries else 0
                del names[key]

    def _put(self, key: PrefixKey, part: PrefixPart, size: int) -> None:
        """Keep an entry, unless it alone is over the budget; the least recently used make room."""
        if size > self.budget_bytes:
            self._remember(key)
            return
        while self.bytes + size > self.budget_bytes:
            oldest, (_, freed) = self._entries.popitem(last=False)
            self.bytes -= freed
            self._remember(oldest)
        self._entries[key] = part, size
        self._evicted.pop(key, None)
        self.bytes += size

    def _remember(self, key: PrefixKey) -> None:
        """That this one was here once."""
        self._evicted[key] = None
        self._evicted.move_to_end(key)
        if len(self._evicted) > REMEMBERED:
            self._evicted.popitem(last=False)
