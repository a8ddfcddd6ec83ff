"""Attention over a flat token stream whose sequences share prefixes (a forest of depth two).

Contract
    q [T, heads, d], k and v [T, kv_heads, d] are one flat stream of *spans*. A trunk span attends
    causally to itself. A leaf span attends to the whole of its trunk, then causally to itself.
    Grouped-query attention: query head i reads kv head i // (heads / kv_heads).
    The trunk of a leaf is a span of the same stream, or comes from outside as (k, v) of an earlier
    pass (no gradient to it then). Spans may be empty, leaves may have no trunk, rows outside every span give 0.
    Queries may be some rows of the stream of keys (context parallelism, ``plan.Span``).

``reference`` defines the result and holds every score matrix. Two forms are fast, and hold out and log-sum-exp only:
    ``fused``        torch's fused kernels on padded blocks, merged by log-sum-exp, exactly, in forward and backward.
                     CPU and CUDA, float64 too. On CUDA that is the memory-efficient kernel, whose backward
                     takes the log-sum-exp of the merged softmax.
    ``triton_impl``  one kernel forward and two backward on the stream as it lies, for CUDA.

Work for one group of prefix P with G leaves of length R, per query head (multiply-add = 2 FLOPs):
    forward 4 d (P^2 / 2 + G R P + G R^2 / 2); the backward 2.5x of it (Triton 3.5x: scores are computed for the
    gradient of queries and for that of keys).
Bytes, Triton: q, k, v read and out written once from memory, 4 more per row and head; backward once more with dO, and
    dq, dk, dv written. A tile's keys come from the cache: 2 d itemsize kv_heads (P + R / 2) per tile of query rows.
    A trunk that more than 8,192 leaf rows see costs 8 d per key, kv head and 8,192 rows more in the backward.
    ``fused`` copies every operand into blocks besides, keys and values of the causal part once per query head.
Limits, Triton: head dim up to 256, not float64, T < 2^30. A head dim between powers of two is padded (80 and 96 cost
    as 128). Equal inputs give equal bits, but a row's last bits depend on the rows it shares a tile with. Few query
    rows on very long trunks leave multiprocessors idle: a tile is not split over keys.
"""
