"""Attention over a flat token stream whose sequences share prefixes (a forest of depth two).

Contract
    q [T, heads, d], k and v [T, kv_heads, d] are one flat stream of *spans*. A trunk span attends
    causally to itself. A leaf span attends to the whole of its trunk, then causally to itself.
    Grouped-query attention: query head i reads kv head i // (heads / kv_heads).
    The trunk of a leaf is a span of the same stream, or comes from outside as (k, v) of an earlier
    pass (no gradient to it then).

Work for one group of prefix P with G leaves of length R, per query head (multiply-add = 2 FLOPs):
    forward 4 d (P^2 / 2 + G R P + G R^2 / 2); the backward 2.5x of it.
Memory: the fused form keeps out and log-sum-exp only; the reference holds every score matrix.

``reference`` defines the result; ``fused`` computes the parts with torch's fused kernels and merges
them by log-sum-exp, exactly, in forward and backward.
"""
