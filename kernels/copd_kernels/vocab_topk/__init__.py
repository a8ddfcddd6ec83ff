"""The k largest of each row of logits with their column ids, the row's log-sum-exp and given columns, in one read.

Shapes: R rows (tokens), V columns (vocabulary, or one shard of it), K kept, J columns asked for.

``vocab_topk(logits_RV, k, ids_RJ)`` gives values_RK (descending), ids_RK int64, lse_R and picked_RJ, the logits at
``ids_RJ`` (0 where an id lies outside this shard's [0, V)). Equal values keep the lowest ids, lowest first, so the
answer does not depend on how the columns are cut: ``merge_topk`` over the shards' answers equals the answer over all
columns. (``torch.topk`` promises nothing about equal values.)

FLOPs: about 4 R V (compare, subtract, two exp) plus R K log K. Bytes: R V x itemsize read once, R K x 12 written, in
Triton also a queue of max(512, 2 K) candidates per row, 8 bytes each;
the reference reads the row about four times and holds one more [R, V] tensor; rows with equal values at the border, on
CUDA all rows, take another pass of top-k and three such tensors.
Limits: 1 <= k (<= 256 in Triton); V < 2^30; a shard narrower than k fills up with value -inf and id -1; NaN gives no
order; Triton: float32 logits.
"""
