"""Floating-point operations of one update, in closed form, for three ways of evaluating the same lanes.

One update is N scorings (the G completions of one prompt under each of N experts, forward only) and one
forward and backward of one expert over them; the backbone gets no weight gradients. The ways:

    naive       every lane carries its own copy of the prompt
    per_expert  the completions of a group share their prompt, one scoring pass per expert
    shared      all lanes of the group pass together: below ``first_layer`` once for all experts, and
                in scope ``completion`` one prompt for all experts, which is never differentiated

A stream of T tokens with a score for each of S (query, key) pairs costs per layer, at 2 FLOPs per
multiply-add, with W the weights of the layer's linears, d the head dim and r the rank:

    linears     2 T W           backward: 1x (gradient of the input); of a MoE layer's MLP, W is the router's weights
                                and those of the top-k MoE experts that a token passes
    attention   4 d heads S     backward: 2.5x (scores again, then gradients of q, k, v and scores)
    adapters    2 r (in + out)  per adapted row and projection; backward: 2x (A, B, hidden, input)
    head        2 H V           per scored token, once; backward: 1x (gradient of the input)

Layers below ``first_layer`` have no backward, and the first adapted linear differentiates no input. What
``model.recompute`` adds is `recomputed_flops`.
Norms, rotary angles, the embedding and padding are left out.
"""
from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from copd_megatron.config.model import AdapterConfig
from copd_megatron.model.shared_prefix import LeafGroup, PackRules, StateKey
from copd_megatron.model.spec import BackboneSpec

Way = Literal["naive", "per_expert", "shared"]
WAYS: tuple[Way, ...] = ("naive", "per_expert", "shared")

LINEARS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that one linear of a layer fuses, in the order the linears are applied."""


@dataclass(frozen=True)
class UpdateShape:
    """Lengths and counts of one update.

    Example: ``UpdateShape(prefix=256, completion=32, group=8, experts=3)``.
    """

    prefix: int
    """P: tokens of the prompt, its generation header included."""
    completion: int
    """R >= 1: tokens of each completion; no two completions of the group are equal."""
    group: int = 8
    """G: completions of the prompt."""
    experts: int = 3
    """N: experts that score every completion."""
    header: int = 3
    """Tokens of the generation header, which scope ``completion`` adapts as well; 1 <= header <= prefix."""

    def forced(self, adapter: AdapterConfig) -> int:
        """Prompt tokens that every leaf starts with."""
        return self.header if adapter.scope == "completion" else 1


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by where they are spent."""

    linears: float = 0.0
    adapters: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True)
class Stream:
    """Tokens that pass a layer together."""

    tokens: int = 0
    pairs: int = 0
    """(query, key) pairs that attention scores."""
    adapted: int = 0
    """Tokens that some expert's adapters act on."""

    def __add__(self, other: Stream) -> Stream:
        return Stream(self.tokens + other.tokens, self.pairs + other.pairs, self.adapted + other.adapted)


@dataclass(frozen=True)
class PassStreams:
    """The streams of one pass through the backbone."""

    below: Stream
    """Layers below ``first_layer``; no backward."""
    trunks: Stream
    """Layers from ``first_layer`` on, prompts that no adapter touches; no backward."""
    lanes: Stream
    """Layers from ``first_layer`` on, everything else."""
    scored: int
    """Tokens whose log-probs are taken."""


def pass_streams(shape: UpdateShape, adapter: AdapterConfig, experts: int, sharing: bool) -> PassStreams:
    """Streams of a pass that evaluates all completions of the group under ``experts`` experts."""
    forced, lanes = shape.forced(adapter), experts * shape.group
    leaf, trunk = forced + shape.completion - 1, shape.prefix - forced
    everything = adapter.scope == "sequence"
    scored = lanes * shape.completion
    if not sharing:
        whole = trunk + leaf
        copies = Stream(lanes * whole, lanes * _causal(whole), lanes * (whole if everything else leaf))
        return PassStreams(replace(copies, adapted=0), Stream(), copies, scored)
    leaf_pairs = _causal(leaf) + leaf * trunk
    below = Stream(trunk + shape.group * leaf, _causal(trunk) + shape.group * leaf_pairs)
    if everything:
        own = Stream(experts * trunk + lanes * leaf, experts * _causal(trunk) + lanes * leaf_pairs,
                     experts * trunk + lanes * leaf)
        return PassStreams(below, Stream(), own, scored)
    leaves = Stream(lanes * leaf, lanes * leaf_pairs, lanes * leaf)
    return PassStreams(below, Stream(trunk, _causal(trunk)), leaves, scored)


def group_streams(group: LeafGroup, rules: PackRules, decoded: bool = False, outside: bool = False,
                  kept: Container[StateKey] = ()) -> PassStreams:
    """Streams of one group as a pack holds it (``model.shared_prefix``): lanes of any lengths, under any experts.

    Args:
        decoded: lanes as they are sampled, which nobody can merge where they turn out equal.
        outside: the prompt's states come from elsewhere.
        kept: states that are given where they enter ``first_layer``.
    """
    forced, ids = rules.forced(group.prompt), [tuple(leaf.token_ids) for leaf in group.leaves]
    trunk, everything = len(group.prompt.token_ids) - forced, rules.scope == "sequence"
    lanes = [(leaf.lane, content) for leaf, content in zip(group.leaves, ids)]
    scored = sum(map(len, ids))
    if not rules.sharing:
        copies = sum((_whole(trunk, forced, len(content), lane is not None, everything) for lane, content in lanes),
                     Stream())
        return PassStreams(replace(copies, adapted=0), Stream(), copies, scored)
    upper, lower = (lanes, ids) if decoded else (dict.fromkeys(lanes), dict.fromkeys(ids))
    lower = [content for content in lower if (group.prompt.content_hash, content) not in kept]
    leaves = sum((_leaf(trunk, forced, len(content), lane is not None) for lane, content in upper), Stream())
    below = sum((_leaf(trunk, forced, len(content), False) for content in lower), Stream())
    if outside:
        return PassStreams(below, Stream(), leaves, scored)
    prompt = Stream(trunk, _causal(trunk))
    if lower or (group.prompt.content_hash, None) not in kept:
        below += prompt
    if not everything:
        return PassStreams(below, prompt, leaves, scored)
    own = sum((replace(prompt, adapted=trunk * (lane is not None)) for lane in dict.fromkeys(e for e, _ in lanes)),
              Stream())
    return PassStreams(below, Stream(), own + leaves, scored)


def _leaf(trunk: int, forced: int, completion: int, adapted: bool) -> Stream:
    tokens = forced + max(0, completion - 1)
    return Stream(tokens, _causal(tokens) + tokens * trunk, tokens * adapted)


def _whole(trunk: int, forced: int, completion: int, adapted: bool, everything: bool) -> Stream:
    """A lane that carries its own prompt."""
    leaf = forced + max(0, completion - 1)
    return Stream(trunk + leaf, _causal(trunk + leaf), adapted * (leaf + trunk * everything))


def pass_flops(spec: BackboneSpec, adapter: AdapterConfig, streams: PassStreams, backward: bool,
               stored: bool = False, layers: Sequence[int] | None = None) -> Flops:
    """Cost of one pass.

    Args:
        backward: also the backward.
        stored: the states that no adapter touches (``below``, ``trunks``) come from an earlier pass.
        layers: only these, and the head if the last layer is among them; None: all.
    """
    lower, upper = split_at(adapter.first_layer, range(spec.num_layers) if layers is None else layers)
    last = layers is None or spec.num_layers - 1 in layers
    lanes = _forward(spec, adapter, streams.lanes, upper)
    cost = lanes + Flops(head=last * 2.0 * spec.hidden_size * spec.vocab_size * streams.scored)
    if not stored:
        cost += _forward(spec, adapter, streams.below, lower) + _forward(spec, adapter, streams.trunks, upper)
    if backward:
        back = Flops(lanes.linears, 2 * lanes.adapters, 2.5 * lanes.attention)
        cost += back + Flops(head=cost.head) + _undifferentiated(spec, adapter, streams.lanes, upper) * -1
    return cost


def split_at(first_layer: int, layers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those of the layers below ``first_layer``, and the others."""
    return [n for n in layers if n < first_layer], [n for n in layers if n >= first_layer]


def recomputed_flops(spec: BackboneSpec, adapter: AdapterConfig, streams: PassStreams, recompute: str,
                     layers: Sequence[int] | None = None) -> Flops:
    """What the backward evaluates again under ``model.recompute``, on top of `pass_flops`.

    ``full``: the forward of the layers that have one, adapters included. ``selective``: their attention; norms and
    activations, which are computed again as well, have no operations here. The head makes its logits again anyway.

    Args:
        layers: only these; None: all.
    """
    _, upper = split_at(adapter.first_layer, range(spec.num_layers) if layers is None else layers)
    again = _forward(spec, adapter, streams.lanes, upper)
    return {"none": Flops(), "selective": Flops(attention=again.attention), "full": again}[recompute]


def update_flops(way: Way, shape: UpdateShape, spec: BackboneSpec, adapter: AdapterConfig,
                 stored: bool = False) -> Flops:
    """Cost of one update: N scorings, one forward, one backward.

    Args:
        stored: the forward of the update takes the states that no adapter touches from the scoring
            instead of computing them again; naive evaluation has none to take.
    """
    sharing = way != "naive"
    together = shape.experts if way == "shared" else 1
    scoring = pass_flops(spec, adapter, pass_streams(shape, adapter, together, sharing), backward=False)
    update = pass_flops(spec, adapter, pass_streams(shape, adapter, 1, sharing), backward=True,
                        stored=stored and sharing)
    return scoring * (shape.experts / together) + update


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _shape(spec: BackboneSpec, projection: str) -> tuple[int, int]:
    """(out, in) of a projection."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    return {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q),
            "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}[projection]


def _weights(spec: BackboneSpec, layer: int, linears: Sequence[tuple[str, ...]] = LINEARS) -> int:
    """Weights that one token meets in these linears of a layer; the last of all of them are a MoE layer's MLP."""
    own = sum(out * inp for linear in linears for p in linear if spec.has_linear(layer, p)
              for out, inp in [_shape(spec, p)])
    if not spec.is_moe(layer) or linears[-1] != LINEARS[-1]:
        return own
    moe = spec.moe
    return own + spec.hidden_size * (moe.experts + 3 * moe.top_k * moe.ffn_hidden_size)


def _forward(spec: BackboneSpec, adapter: AdapterConfig, stream: Stream, layers: Sequence[int]) -> Flops:
    """The forward of a stream through some layers."""
    weights = sum(_weights(spec, layer) for layer in layers)
    widths = sum(sum(_shape(spec, p)) for layer in layers for p in adapter.targets if spec.has_linear(layer, p))
    return Flops(2.0 * stream.tokens * weights, 2.0 * stream.adapted * adapter.rank * widths,
                 4.0 * spec.head_dim * spec.num_heads * stream.pairs * len(layers))


def _undifferentiated(spec: BackboneSpec, adapter: AdapterConfig, stream: Stream, layers: Sequence[int]) -> Flops:
    """What the backward of these layers, none of them below ``first_layer``, leaves out: up to the first linear with
    an adapter."""
    first, layer = next((i, layer) for layer in range(adapter.first_layer, spec.num_layers)
                        for i, linear in enumerate(LINEARS) if any(
                            p in adapter.targets and spec.has_linear(layer, p) for p in linear))
    before = _forward(spec, adapter, stream, [n for n in layers if n < layer])
    if layer not in layers:
        return replace(before, attention=2.5 * before.attention)
    weights = _weights(spec, layer, LINEARS[:first + 1])
    inputs = sum(_shape(spec, p)[1] for p in LINEARS[first] if p in adapter.targets)
    attention = _forward(spec, adapter, stream, range(layer, layer + 1)).attention if first > 0 else 0.0
    return Flops(before.linears + 2.0 * stream.tokens * weights, 2.0 * stream.adapted * adapter.rank * inputs,
                 2.5 * (before.attention + attention))
