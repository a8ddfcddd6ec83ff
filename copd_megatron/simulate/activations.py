"""Bytes that a pass through the backbone holds: what autograd saves, and what exists only for a moment.

Frozen linears save nothing but their weight. What remains of a layer, per row of the stream (H hidden, Q = heads x d
and K = kv heads x d and F feed-forward per tensor-parallel rank, r LoRA rank, b bytes of the compute type, w of the
norms' wide type):

    norms       (H + 1) w each; q and k norms (Q + K) w, where the wide type is the compute type K is a view of qkv
    adapters    their input, H b (qkv; gate, up), F b (down); each r b after A; o_proj's input is attention's output
    rotary      4 d b (cos and sin, for q and for k)
    attention   q Q b, k K b, out Q b, log-sum-exp heads x 4, and v as a view of the fused qkv: (Q + 2 K) b
    SwiGLU      fused gate and up 2 F b, silu(gate) F b
    MoE layer   in place of SwiGLU: scores E w and their sorting 8 E, 40 bytes for each of the top k, and for each MoE
                expert that a row passes 4 F b of its own F: fused gate and up, silu(gate), their product

With ``model.recompute=full`` a layer saves its input, H b, and one layer at a time is as above. With ``selective``
norms keep their input in the compute type, attention neither log-sum-exp nor an out that no adapter reads, SwiGLU no
silu(gate). Under sequence parallelism a rank has 1 / TP of the rows of norms, of the adapters' inputs of width H and
of their r numbers after row-parallel linears; under context parallelism it keeps the gathered k and v, 2 CP K b, in
place of its own. Rows are taken to choose all MoE experts alike often: what expert parallelism brings to a rank is as
much as what leaves it. A layer whose input needs no gradient (the first adapted one) saves less. Where scope is
``completion``, trunks keep k and v for the leaves' backward. Counted for prefix sharing; naive packs in scope
``completion`` copy some rows besides. Counted as on CUDA; on a CPU the backward of bfloat16 attention works on float32
copies of a block.
"""
from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.model.backbone import DTYPES, stage_layers
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.vocab_parallel import chunk_tokens_of
from copd_megatron.parallel.layout import Layout
from copd_megatron.simulate.job import Job, Rows

HEAD_COPIES_FORWARD, HEAD_COPIES_BACKWARD, HEAD_COPIES_FULL = 2, 2, 4
"""[chunk, vocabulary] tensors that exist together: the logits and their exponentials; of both sides with ``full``."""
TOPK_COPIES = 10
"""[rows, k] tensors of the math type that a top-k divergence saves or makes, int64 ids counted as two."""


@dataclass(frozen=True)
class Width:
    """Widths of one rank's tensors, in elements, and bytes of its types."""

    hidden: int
    q: int
    """Q: query heads of the rank x head dim."""
    kv: int
    ffn: int
    head_dim: int
    heads: int
    kv_heads: int
    vocab: int
    item: int
    """b, bytes of the compute type."""
    wide: int
    """w, bytes of the type that norms compute in."""
    math: int
    """Bytes of logits and log-probs."""
    sequence: int = 1
    """Ranks that share the rows between linears: TP under sequence parallelism."""
    context: int = 1
    """Ranks whose keys and values each of them gathers: CP."""
    moe: float = 0
    """Numbers that a MoE layer makes at a time for one row: copies of it, gate and up of each MoE expert it passes."""

    @classmethod
    def of(cls, job: Job, layout: Layout) -> Width:
        """Of a rank under this layout."""
        spec, tp = job.spec, layout.tp
        item = DTYPES[job.model.dtype].itemsize
        wide = max(4, item)
        heads, kv_heads = spec.num_heads // tp, spec.kv_groups(tp) // tp
        return cls(spec.hidden_size, heads * spec.head_dim, kv_heads * spec.head_dim, _dense_width(spec, tp),
                   spec.head_dim, heads, kv_heads, spec.padded_vocab_size(tp) // tp, item, wide, wide,
                   tp if layout.sequence_parallel else 1, layout.cp, _moe_width(spec, layout))

    @property
    def mixed(self) -> int:
        """The fused q, k, v."""
        return self.q + 2 * self.kv


def _dense_width(spec: BackboneSpec, tp: int) -> int:
    """F of dense layers, 0 where there are none."""
    return 0 if spec.moe and len(spec.moe.layers) == spec.num_layers else spec.ffn_hidden_size // tp


def _moe_width(spec: BackboneSpec, layout: Layout) -> float:
    if spec.moe is None:
        return 0
    return spec.moe.top_k * (spec.hidden_size + 2 * spec.moe.ffn_hidden_size) / layout.tp


def layer_row_bytes(job: Job, width: Width, layer: int, needs_grad: bool) -> float:
    """Bytes that autograd saves for one row in one (global) layer, on one of the ranks that have it.

    Args:
        needs_grad: whether the layer's input does; not so in the first layer with adapters.
    """
    adapted, rank = _adapted(job, layer), job.adapter.rank
    b, norm = width.item, _norm_row_bytes(job, width)
    hidden, own_rank = width.hidden / width.sequence, rank / width.sequence
    total, grad = 0.0, needs_grad
    if grad:
        total += norm
    into_qkv = adapted & {"q_proj", "k_proj", "v_proj"}
    if into_qkv:
        total += (hidden + len(into_qkv) * rank) * b
        grad = True
    if grad:
        total += _attention_row_bytes(job, width)
    if "o_proj" in adapted:
        total += own_rank * b + (0 if grad and not _selective(job) else width.q * b)
        grad = True
    if grad:
        total += norm
    into_fc1 = adapted & {"gate_proj", "up_proj"}
    if into_fc1:
        total += (hidden + len(into_fc1) * rank) * b
        grad = True
    if grad:
        total += _moe_row_bytes(job, width) if job.spec.is_moe(layer) else (2 if _selective(job) else 3) * width.ffn * b
    if "down_proj" in adapted:
        total += (width.ffn + own_rank) * b
    return total


def _adapted(job: Job, layer: int) -> set[str]:
    return {target for target in job.adapter.targets if job.spec.has_linear(layer, target)}


def _moe_row_bytes(job: Job, width: Width) -> float:
    """Of router, dispatch and MoE experts; ETP gathers as many rows as it cuts them."""
    moe = job.spec.moe
    routing = moe.experts * (width.wide + 8) + 40 * moe.top_k
    experts = moe.top_k * ((2 if _selective(job) else 4) * moe.ffn_hidden_size + 1) * width.item
    return (routing + experts) / width.sequence


def _selective(job: Job) -> bool:
    return job.model.recompute == "selective"


def _norm_row_bytes(job: Job, width: Width) -> float:
    return (width.hidden * width.item if _selective(job) else (width.hidden + 1) * width.wide) / width.sequence


def _attention_row_bytes(job: Job, width: Width) -> int:
    b, w = width.item, width.wide
    total = (4 * width.head_dim + width.q) * b
    # Queries of several kv groups are copied out of the fused tensor, keys are a view of it.
    copied = width.q if width.kv_heads > 1 else 0
    if _selective(job):
        return total + (width.kv + width.mixed + copied * job.spec.qk_norm) * b
    if width.context > 1:
        total += 2 * width.context * width.kv * b + (width.mixed if job.spec.qk_norm and b == w else 0) * b
    else:
        total += (width.kv + width.mixed) * b
    total += width.q * b + width.heads * max(4, width.math)
    if job.spec.qk_norm:
        total += (width.heads + width.kv_heads) * w
        total += (width.q if b != w else copied) * w
        total += width.kv * w if b != w else 0
    return total


def saved_bytes(job: Job, layout: Layout, stage: int, rows: Rows, width: Width) -> float:
    """What the forward of one microbatch leaves for its backward on one rank."""
    grad_rows, trunk_rows = _differentiated(job, rows)
    first = job.adapter.first_layer
    layers = [i for i in stage_layers(job.spec.num_layers, layout.pp, stage, layout.vp) if i >= first]
    total = 0.0
    if job.model.recompute == "full":
        total += len(layers) * grad_rows * width.hidden / width.sequence * width.item
    else:
        total += sum(grad_rows * layer_row_bytes(job, width, index, index > first) + _working_copies(job, width, index)
                     for index in layers)
    total += len(layers) * trunk_rows * 2 * width.context * width.kv * width.item
    if stage == layout.pp - 1:
        # The head keeps a mean of its rows for each of the own ones; context ranks also keep all rows that are scored.
        everybodys = 0 if width.context == 1 else width.context * width.hidden * width.item
        total += rows.scored * ((width.hidden + 1) * width.wide / width.sequence + everybodys)
        total += rows.scored * width.hidden * width.math
        total += rows.scored * _topk(job) * width.math * TOPK_COPIES
    if layout.pp > 1:  # the pipeline keeps what it received and what it sends, chunk by chunk
        total += 2 * layout.vp * rows.tokens * width.hidden / width.sequence * width.item
    return total


def _differentiated(job: Job, rows: Rows) -> tuple[int, int]:
    """(rows with gradients, trunk rows without) of a microbatch above ``first_layer``."""
    apart = job.adapter.scope == "completion" and job.model.prefix_sharing
    return (rows.leaves, rows.trunk) if apart else (rows.tokens, 0)


def _working_copies(job: Job, width: Width, layer: int) -> int:
    """Bytes of adapters that one layer saves as copies: fused A, and all of them where types differ."""
    adapted, rank, b = _adapted(job, layer), job.adapter.rank, width.item
    fused = len(adapted & {"q_proj", "k_proj", "v_proj"}) + len(adapted & {"gate_proj", "up_proj"})
    copies = fused * rank * width.hidden * b
    if b < 4:
        outs = {"q_proj": width.q, "k_proj": width.kv, "v_proj": width.kv, "o_proj": width.hidden + width.q,
                "gate_proj": width.ffn, "up_proj": width.ffn, "down_proj": width.hidden + width.ffn}
        copies += sum(outs[p] for p in adapted) * rank * b
    return copies


def _topk(job: Job) -> int:
    kinds = {edge.signal for edge in job.edges}
    return min(job.opd.topk, job.spec.vocab_size) if kinds & {"topk", "student_topk"} else 0


def backward_bytes(job: Job, layout: Layout, rows: Rows, width: Width) -> float:
    """What the backward makes on the way, at its fullest: where it begins, in the last layer's SwiGLU.

    Later each layer frees more than its gradients need. With ``model.recompute=full`` also all that one layer saves
    when it is recomputed.
    """
    grad_rows, _ = _differentiated(job, rows)
    total = grad_rows * (2 * width.hidden + max(2 * width.ffn, width.moe)) * width.item
    if job.model.recompute == "full":
        layers = range(job.adapter.first_layer, job.spec.num_layers)
        total += max(grad_rows * layer_row_bytes(job, width, i, True) + _working_copies(job, width, i) for i in layers)
    return total


def forward_bytes(job: Job, rows: Rows, width: Width) -> float:
    """What a layer makes on the way when nothing is saved; trunks that no adapter touches pass it before the rest."""
    grad_rows, trunk_rows = _differentiated(job, rows)
    together = max(grad_rows, trunk_rows)
    return (rows.tokens - together) * width.hidden * width.item + together * forward_row_bytes(width)


def forward_row_bytes(width: Width) -> int:
    """What a layer makes on the way for one row, where it is fullest."""
    swiglu = (2 * width.hidden + max(4 * width.ffn, 2 * width.moe)) * width.item + width.hidden * width.wide
    return max(swiglu, (2 * width.hidden + 5 * width.q + 3 * width.mixed) * width.item)


def head_bytes(job: Job, rows: Rows, width: Width, backward: bool) -> float:
    """Logits of one chunk of rows, in the math type, and their temporaries; of a GPU, where chunks are larger."""
    chunk = min(chunk_tokens_of(job.model.head_chunk_tokens, width.vocab, width.math, "cuda"), rows.scored)
    full = backward and any(edge.signal == "full" for edge in job.edges)
    copies = HEAD_COPIES_FULL if full else HEAD_COPIES_BACKWARD if backward else HEAD_COPIES_FORWARD
    return chunk * width.vocab * width.math * copies
