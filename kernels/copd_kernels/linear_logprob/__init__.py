"""Log-probs of given tokens under a linear head, for one shard of the vocabulary and one block of tokens.

Shapes: T tokens of the block, H hidden, V vocabulary rows of this shard, K ids per token.

``linear_logprob(hidden_TH, weight_VH, ids_TK, temperature, entropy, rest)``, z = hidden weight^T / temperature:
  lse_T      log sum exp z over the shard (-inf if V = 0)
  entropy_T  entropy of softmax(z) over the shard, nats (None unless asked)
  picked_TK  z at ``ids_TK``, which count from the shard's first row; an id outside [0, V) gives 0
  rest_TH    sum of softmax(z)_v weight_v / temperature over the shard's v that are no id of the token (None unless
             asked): what a gradient of log-probs needs of the logits, so that they need not exist again
Shards combine by the chain rule of entropy: H = sum over shards of w (H_shard - log w) with
w = exp(lse_shard - lse); the shard's part of the whole softmax's rest is w rest_TH.

``picked_gradient`` makes of that part, and of the gradients g of log-probs at the ids, this shard's part of the
gradient of the hidden states: sum over k of g_k (weight_k - whole mean), with the ids' own terms (g_k - sum(g) p_k)
weight_k apart, so that what cancels is subtracted before anything is rounded. ``linear_logprob_backward`` computes
the logits again; it knows the gradient of the entropy as well. Both take the GLOBAL lse and entropy; the sum over the
shards is the whole. The head is frozen: there is no gradient of the weight.

Math is float64 for float64 hidden states, else float32, also for bfloat16 inputs.

FLOPs: forward 2 T H V, with the rest 4 T H V; ``picked_gradient`` 2 T H K; ``linear_logprob_backward`` 4 T H V.
Bytes: (T H + V H) x itemsize at least; the reference also holds two [T, V] tensors in the math dtype, the Triton form
one, which is overwritten. ``picked_gradient`` 2 T H x 4 and K rows of the head per token, T K H x itemsize at most;
the reference gathers them first, in float32, where the head is narrower, of as many tokens as 64 MiB hold.
Limits: not float64 in Triton; T V < 2^31 elements; no gradient of a gradient; ids repeated in a row add up in any
order in the reference on CUDA.
"""
