"""Log-probs of given tokens under a linear head, for one shard of the vocabulary and one block of tokens.

Shapes: T tokens of the block, H hidden, V vocabulary rows of this shard, K ids per token.

``linear_logprob(hidden_TH, weight_VH, ids_TK, temperature, entropy)``, z = hidden weight^T / temperature:
  lse_T      log sum exp z over the shard (-inf if V = 0)
  entropy_T  entropy of softmax(z) over the shard, nats (None unless asked)
  picked_TK  z at ``ids_TK``, which count from the shard's first row; an id outside [0, V) gives 0
Shards combine by the chain rule of entropy: H = sum over shards of w (H_shard - log w) with
w = exp(lse_shard - lse).

``linear_logprob_backward`` takes the GLOBAL lse and entropy and returns this shard's part of the gradient of
the hidden states; the sum over shards is the whole. The head is frozen: there is no gradient of the weight.

Math is float64 for float64 hidden states, else float32, also for bfloat16 inputs.

FLOPs: forward 2 T H V, backward 4 T H V (logits are recomputed). Bytes: (T H + V H) x itemsize at least; the
reference also holds two [T, V] tensors in the math dtype, the Triton form one, which its backward overwrites.
Limits: not float64 in Triton; T V < 2^31 elements; no gradient of a gradient; ids repeated in a row add up in any
order in the reference on CUDA.
"""
