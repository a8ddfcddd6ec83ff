"""The frozen backbone on this rank's shards: Megatron's parts, our walk through the layers.

A pipeline stage holds the layers ``layer_range``: one chunk of neighbours, or several that the stream reaches round
after round (``parallel.virtual_pipeline``). The stream of a pack enters as embeddings (first
chunk) or as the previous chunk's output, changes from the lower to the upper level at
``first_layer`` (rows fan out to the lanes), and leaves as a pipeline tensor or, after the last layer,
as the final-normed hidden states that predict completion tokens.

Nothing below ``first_layer`` is differentiated, and trunks that no adapter touches are not either. Where all that
enters ``first_layer`` was kept (``Pack.kept``), the layers below are left out: stages that hold no others hand on one
row that nobody reads.

Under context and sequence parallelism the rows of a pack are shared out (``row_share``). Lanes fan out from any rank's
rows to any other's, so there all rows of the lower stream are gathered once: hidden size numbers per token, forward
only. On the last stage the rows that predict completion tokens are gathered, every rank has them all, and context
ranks share out the head's work on them.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from copd_kernels.backend import resolve
from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.attention import KV, StreamAttention, choose_attention
from copd_megatron.model.fp8 import check_fp8
from copd_megatron.model.layer_spec import build_layer, transformer_config
from copd_megatron.model.moe_layer import choose_product
from copd_megatron.model.norms import RMSNorm
from copd_megatron.model.rope import rotary_frequencies
from copd_megatron.model.row_share import RowShare
from copd_megatron.model.shared_prefix import Pack, PackRules
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.stream import Level
from copd_megatron.model.vocab_parallel import Head
from copd_megatron.optional import choose_maker
from copd_megatron.parallel.collectives import assert_same_on_all_ranks
from copd_megatron.parallel.groups import Groups
from copd_megatron.platform import device
from copd_megatron.types import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

Visual = tuple[Tensor, Sequence[Tensor]]
"""Merged features [n, H] of all the pack's prompts in order, and the deepstack features per layer."""


def layer_chunks(num_layers: int, chunks: int) -> list[range]:
    """Global layers of each chunk of the backbone: contiguous, as even as possible, the longer ones first.

    Chunk c is on pipeline stage c % PP, as Megatron's interleaved schedule lays them out.
    """
    base, extra = divmod(num_layers, chunks)
    starts = [chunk * base + min(chunk, extra) for chunk in range(chunks + 1)]
    return [range(start, end) for start, end in zip(starts, starts[1:])]


def stage_layers(num_layers: int, pp: int, stage: int, vp: int = 1) -> list[int]:
    """Global layers of a pipeline stage with ``vp`` chunks, lowest first."""
    return [layer for chunk in layer_chunks(num_layers, pp * vp)[stage::pp] for layer in chunk]


class Backbone(nn.Module):
    """One pipeline stage of the backbone with the adapters of all policies it serves.

    Weights are uninitialised until ``translate.load_backbone_weights`` fills them.
    """

    model_type = ModelType.encoder_or_decoder
    """Read by Megatron's pipeline schedules."""

    def __init__(self, spec: BackboneSpec, groups: Groups, model: ModelConfig, adapter: AdapterConfig,
                 checked: bool = False):
        """``checked``: compare hidden states over the tensor-parallel ranks (``parallel.debug_checks``)."""
        super().__init__()
        spec.check_layout(groups.layout)
        spec.check_adapter(adapter)
        self.spec, self.groups, self.model_config = spec, groups, model
        self.dtype = DTYPES[model.dtype]
        norms = choose_maker("model.norms", model.norms, "fused layer norm",
                             device().type == "cuda" and self.dtype != torch.float64)
        self.config = transformer_config(spec, groups, self.dtype, norms)
        self.rules = PackRules(adapter.scope, adapter.first_layer, model.prefix_sharing, spec.rope)
        self.backend = choose_attention(model, spec.head_dim, self.dtype)
        check_fp8(model.fp8, self.dtype, device())
        try:
            self.kernels = resolve(model.kernels, device(), self.dtype)
        except ValueError as error:
            raise UserError(f"model.kernels: {error}") from None
        pp, vp = groups.layout.pp, groups.layout.vp
        self.chunks = layer_chunks(spec.num_layers, pp * vp)[groups.coords.pp::pp]
        self.layer_range = stage_layers(spec.num_layers, pp, groups.coords.pp, vp)
        self.share = _row_share(groups)
        self.checked = checked and groups.layout.tp > 1
        adapter_dtype = torch.promote_types(self.dtype, torch.float32)
        self.bank = AdapterBank(spec, adapter, groups, self.layer_range, adapter_dtype, device())
        padded = spec.padded_vocab_size(groups.layout.tp)
        if groups.is_first_stage:
            self.embedding = VocabParallelEmbedding(padded, spec.hidden_size, init_method=nn.init.zeros_,
                                                    config=self.config, tp_group=groups.tp).requires_grad_(False)
        self.selective = model.recompute == "selective"
        experts = choose_product(model, spec, groups.layout, self.dtype)
        self.layers = nn.ModuleList(build_layer(spec, self.config, groups, self.bank, i, self.selective, self.kernels,
                                                model.fp8, experts, norms) for i in self.layer_range)
        if groups.is_last_stage:
            self.final_norm = RMSNorm(self.config, spec.hidden_size, spec.norm_eps, norms).requires_grad_(False)
            if spec.tied_head and groups.is_first_stage:
                self.output_weight = self.embedding.weight
            else:
                self.output_weight = nn.Parameter(
                    torch.empty(padded // groups.layout.tp, spec.hidden_size, dtype=self.dtype, device=device()),
                    requires_grad=False)
        self._input: Tensor | None = None

    @property
    def head(self) -> Head:
        """The frozen, vocab-parallel head; last stage only. Context ranks share out the tokens of packs."""
        return replace(self.own_head, token_group=self.groups.cp if self.groups.layout.cp > 1 else None)

    @property
    def own_head(self) -> Head:
        """The same for tokens that this context rank alone has, as in decoding."""
        shard = self.output_weight.shape[0]
        group = self.groups.tp if self.groups.layout.tp > 1 else None
        return Head(self.output_weight, self.groups.coords.tp * shard, self.spec.vocab_size, group,
                    self.model_config.head_chunk_tokens, self.kernels)

    def set_input_tensor(self, tensor: Tensor | list[Tensor | None] | None) -> None:
        """What Megatron's pipeline schedule received from the previous stage, [T, 1, H]."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def take_input_tensor(self) -> Tensor | None:
        """What ``set_input_tensor`` was given, for a stage that has nothing to evaluate."""
        given, self._input = self._input, None
        return given

    def forward(self, pack: Pack, visual: Visual | None = None, capture: dict[int, KV] | None = None,
                outside: Sequence[Mapping[int, KV]] = (), layers: range | None = None, kept: Tensor | None = None,
                at_border: Callable[[Tensor], None] | None = None) -> Tensor:
        """Evaluate a pack on this stage.

        Args:
            pack: see ``shared_prefix.build_pack``; built with this backbone's ``share``, or whole on each rank.
            visual: features of the pack's prompts; needed for layer 0 and for deepstack layers, if the pack has
                visual tokens.
            capture: receives 1-based layer -> (K, V) of the whole stream (prefill of decoding).
            outside: 1-based layer -> (K, V) of each of ``pack.outside``, which hold no gradient.
            layers: evaluate no others (global numbers); unless they begin with 0, what enters them must have been
                given to ``set_input_tensor``. With several chunks one of them, or a part of it. None: all.
            kept: [K, 1, H] rows of ``pack.kept``, of all context ranks one after the other; for ``first_layer``.
            at_border: is given the rows that enter ``first_layer`` from below, before lanes fan out.

        Returns:
            Last stage: [N, H], final-normed states that predict the completion tokens, all of them on every rank,
            whose gradient must be the same on every rank. Others, and before layers that are left out: [S, 1, H],
            this rank's rows.
        """
        chosen = range(self.spec.num_layers) if layers is None else layers
        hidden = self._enter(pack, visual, max(chosen.start, self.layer_range[0]))
        entered = self._input
        level = None
        for layer, index in zip(self.layers, self.layer_range):
            if index not in chosen or index < pack.begins:
                continue
            if pack.level(index) is not level:
                level = pack.level(index)
                angles = rotary_frequencies(self.spec, level.position_ids)
            if index == pack.first_layer and pack.fanout is not None:
                if at_border is not None:
                    at_border(hidden[0])
                hidden = [self._fanned_out(hidden[0], pack, kept)]
            if len(hidden) != len(level.parts):
                hidden = [hidden[0][part.shard] for part in level.parts]
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= pack.first_layer):
                hidden = self._layer(layer, level, angles, hidden, capture, _joined(outside, index + 1))
                hidden = self._add_deepstack(hidden, level, visual, index)
            if self.share.sequence == 1:
                self._check(hidden, f"layer {index}")
        out = hidden[0] if len(hidden) == 1 else torch.cat(hidden)
        self._input = None
        if not self.groups.is_last_stage or chosen.stop < self.spec.num_layers:
            return _anchor(out, entered) if torch.is_grad_enabled() else out
        scored = self.final_norm(out[:, 0].index_select(0, pack.scored_rows))
        if pack.scored_order is not None:
            scored = self._gathered(scored, pack).index_select(0, pack.scored_order)
        self._check([scored], "the final norm")
        return _anchor(scored, entered) if torch.is_grad_enabled() else scored

    def forward_step(self, token_ids: Tensor, position_ids: Tensor, attention, routing, layers: range,
                     at_border: Callable[[Tensor], None] | None = None) -> Tensor:
        """One decode step of rows [L] (one level throughout): [L, 1, H], final-normed after the last layer.

        Args:
            token_ids: [L]. position_ids: [3, L].
            attention: an object with ``attend(layer, q, k, v)``, see ``attention``.
            routing: (expert, rows) of the adapted rows, applied from ``first_layer`` on.
            layers: one of ``chunks``.
            at_border: is given what enters ``first_layer``, [L, 1, H].
        """
        hidden = self._embed(token_ids) if layers.start == 0 else self._input
        self._input = None
        angles = rotary_frequencies(self.spec, position_ids)
        for layer, index in zip(self.layers, self.layer_range):
            if index not in layers:
                continue
            if at_border is not None and index == self.rules.first_layer:
                at_border(hidden)
            self.bank.routing.set(routing)
            hidden, _ = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles,
                              packed_seq_params=attention)
            self._check([hidden], f"decoding, layer {index}")
        return self.final_norm(hidden) if layers.stop == self.spec.num_layers else hidden

    def _check(self, hidden: list[Tensor], where: str) -> None:
        """Raise AssertionError unless all tensor-parallel ranks hold the same bits; nothing unless ``checked``."""
        if self.checked:
            for part in hidden:
                assert_same_on_all_ranks(part, self.groups.tp, "parallel.debug_checks: hidden states after "
                                         f"{where} (seen by rank {self.groups.rank}), tensor-parallel group")

    def join(self) -> None:
        """Take part in one evaluation of this stage on the other ranks that hold its MoE experts, without rows.

        What stands for a call of ``forward`` (of trunks only) or ``forward_step`` without gradient.
        """
        for layer in self.layers:
            if layer.is_moe_layer:
                layer.mlp.join()

    def _embed(self, token_ids: Tensor, shared: bool = False) -> Tensor:
        """[T, 1, H], or with ``shared`` this tensor-parallel rank's piece of it."""
        self.embedding.reduce_scatter_embeddings = shared
        embedded = self.embedding(token_ids[None])
        return embedded if shared else embedded.transpose(0, 1)

    def _gathered(self, rows: Tensor, pack: Pack) -> Tensor:
        """All ranks' rows one after the other; the backward keeps this rank's, as all have the same gradient."""
        for size, group in ((pack.share.sequence, self.groups.tp), (pack.share.context, self.groups.cp)):
            if size > 1:
                rows = gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=group)
        return rows

    def _enter(self, pack: Pack, visual: Visual | None, first: int) -> list[Tensor]:
        """What enters layer ``first``."""
        if first < pack.begins:  # pipeline schedules pass a tensor on all the same
            return [torch.zeros(1, 1, self.spec.hidden_size, dtype=self.dtype, device=device())]
        if first > 0:  # below the first adapted layer nothing is differentiated
            return [self._input.detach() if first <= pack.first_layer else self._input]
        level = pack.level(0)
        hidden = self._embed(level.token_ids, shared=pack.share.sequence > 1)
        if level.visual_index.numel():
            hidden[level.visual_index, 0] = visual[0].index_select(0, level.visual_source).to(hidden.dtype)
        return [hidden]

    def _fanned_out(self, lower: Tensor, pack: Pack, kept: Tensor | None) -> Tensor:
        """What enters ``first_layer`` of the upper stream, on this rank."""
        rows = ([] if pack.begins else [self._gathered(lower, pack)]) + ([] if kept is None else [kept])
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).index_select(0, pack.fanout)

    def _layer(self, layer: nn.Module, level: Level, angles: Tensor, hidden: list[Tensor],
               capture: dict[int, KV] | None, trunk_kv: dict[int, KV] | None) -> list[Tensor]:
        """All parts of the stream through one layer: trunks without gradient first, then the rest."""
        out = []
        for number, (part, rows) in enumerate(zip(level.parts, hidden)):
            last = number == len(level.parts) - 1
            own = {} if not last else capture
            attention = StreamAttention(plan=part.plan, spans=part.spans, backend=self.backend,
                                        group=None if part.key_order is None else self.groups.cp,
                                        key_order=part.key_order, trunk_kv=trunk_kv, capture=own,
                                        recompute=self.selective)

            def run(x, part=part, attention=attention):
                # Set here, not outside: recomputation in the backward runs other microbatches between.
                self.bank.routing.set(part.routing, part.shard_routing)
                return layer(hidden_states=x, attention_mask=None, rotary_pos_emb=angles[part.rows],
                             packed_seq_params=attention)[0]

            with torch.set_grad_enabled(torch.is_grad_enabled() and last):
                if self.model_config.recompute == "full" and torch.is_grad_enabled():
                    # torch may stop once it has what the backward of this rank's rows needs. But what it made until
                    # then lives on, layer after layer, and no rank may leave out a collective that others enter.
                    with set_checkpoint_early_stop(False):
                        out.append(checkpoint(run, rows, use_reentrant=False, preserve_rng_state=False))
                else:
                    out.append(run(rows if last else rows.detach()))
            trunk_kv = own
        return out

    def _add_deepstack(self, hidden: list[Tensor], level: Level, visual: Visual | None, index: int) -> list[Tensor]:
        """Add the visual features of this depth to the rows that carry them (Meng et al. 2024, arXiv:2406.04334)."""
        if index >= self.spec.deepstack_layers or not level.visual_index.numel():
            return hidden
        features = visual[1][index].index_select(0, level.visual_source).to(hidden[0].dtype)[:, None]
        # Visual tokens are prompt tokens, and trunks are the first part.
        return [hidden[0].index_add(0, level.visual_index, features), *hidden[1:]]


def _joined(trunks: Sequence[Mapping[int, KV]], layer: int) -> dict[int, KV] | None:
    """K, V of a layer of all trunks in a row, as ``StreamAttention.trunk_kv``; None without any."""
    if len(trunks) == 1:
        return {layer: trunks[0][layer]}
    keys_values = zip(*(trunk[layer] for trunk in trunks))
    return {layer: tuple(map(torch.cat, keys_values))} if trunks else None


def _row_share(groups: Groups) -> RowShare:
    """This rank's share of the rows of training and scoring."""
    layout, at = groups.layout, groups.coords
    return RowShare(layout.cp, at.cp, *((layout.tp, at.tp) if layout.sequence_parallel else (1, 0)))


class _Anchor(torch.autograd.Function):
    """Identity on ``out``; gives ``entered`` a zero gradient where no real one reaches it."""

    @staticmethod
    def forward(ctx, out, entered):
        ctx.shape = entered.shape
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_zeros(ctx.shape)


def _anchor(out: Tensor, entered: Tensor | None) -> Tensor:
    """Connect a stage's output to its input: Megatron's schedule differentiates every stage, but no
    gradient crosses layers below the first adapted one."""
    if entered is None:
        entered = torch.zeros(0, dtype=out.dtype, device=out.device, requires_grad=True)
    return _Anchor.apply(out, entered)
