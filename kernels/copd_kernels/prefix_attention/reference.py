"""The definition: each span attends to its trunk and causally to itself, one dense softmax per span."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[tuple[int, int, int, int]],
                     trunk_kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Attention of every span of the stream.

    Args:
        q: [T, heads, d]. k, v: [T, kv_heads, d].
        spans: (start, stop, trunk_start, trunk_stop) per span, in tokens; a trunk has an empty range
            as its trunk. Trunk ranges index ``trunk_kv`` where that is given, else the stream.
        trunk_kv: K and V of trunks evaluated before, each [T_trunk, kv_heads, d].

    Returns:
        [T, heads, d]; rows outside every span are 0.
    """
    groups, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    trunk_k, trunk_v = trunk_kv if trunk_kv is not None else (k, v)
    pieces, rows = [], []
    for start, stop, trunk_start, trunk_stop in spans:
        keys = torch.cat([trunk_k[trunk_start:trunk_stop], k[start:stop]]).repeat_interleave(groups, 1)
        values = torch.cat([trunk_v[trunk_start:trunk_stop], v[start:stop]]).repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], keys) * scale
        length, prefix = stop - start, trunk_stop - trunk_start
        future = torch.ones(length, prefix + length, dtype=torch.bool, device=q.device).triu(prefix + 1)
        probabilities = scores.masked_fill(future, float("-inf")).softmax(-1)
        pieces.append(torch.einsum("hqk,khd->qhd", probabilities, values))
        rows.append(torch.arange(start, stop, device=q.device))
    out = torch.zeros_like(q)
    return out.index_put((torch.cat(rows),), torch.cat(pieces)) if pieces else out
