"""The definition: each span attends to its trunk and causally to itself, one dense softmax per span."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from copd_kernels.prefix_attention.plan import Span


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[tuple[int, ...]],
                     trunk_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Attention of every span of the stream.

    Args:
        q: [T, heads, d]. k, v: [T, kv_heads, d], or of more tokens, of which the queries are some.
        spans: (start, stop, trunk_start, trunk_stop) per span, in tokens; a trunk has an empty range
            as its trunk. Trunk ranges index ``trunk_kv`` where that is given, else the stream of keys. For
            pieces of spans see ``plan.Span``.
        trunk_kv: K and V of trunks evaluated before, each [T_trunk, kv_heads, d].

    Returns:
        [T, heads, d]; rows outside every span are 0.
    """
    groups, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    trunk_k, trunk_v = trunk_kv if trunk_kv is not None else (k, v)
    pieces, rows = [], []
    for span in (Span(*given) for given in spans):
        start, stop, trunk_start, trunk_stop = span[:4]
        own = slice(*span.keys)
        keys = torch.cat([trunk_k[trunk_start:trunk_stop], k[own]]).repeat_interleave(groups, 1)
        values = torch.cat([trunk_v[trunk_start:trunk_stop], v[own]]).repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], keys) * scale
        future = torch.ones(span.length, len(keys), dtype=torch.bool, device=q.device).triu(
            len(keys) - span.length + 1)
        probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", probabilities, values))
        rows.append(torch.arange(start, stop, device=q.device))
    if not pieces:
        return q * 0 + (k.sum() + v.sum()) * 0  # Still a function of all three, as everywhere else.
    return torch.zeros_like(q).index_put((torch.cat(rows),), torch.cat(pieces))
