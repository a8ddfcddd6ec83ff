"""From Hugging Face weight names to this rank's parameters of the backbone.

A parameter here is the concatenation, along rows, of slices of Hugging Face tensors. Megatron's fused layouts
and
tensor-parallel shards (TP) are nothing but the choice of these slices:

* ``linear_qkv``: for each key/value group of the rank [its query heads | its key head | its value head];
  groups are split over TP in contiguous blocks. With fewer key/value heads than ranks each head is on several
  ranks, and its query heads are shared out among them.
* ``linear_fc1``: [this rank's rows of gate | the same rows of up].
* ``linear_proj``, ``linear_fc2``: this rank's columns; their biases are whole on every rank.
* MoE layers: see ``moe_weights``.
* embedding and head: this rank's rows of the vocabulary padded with zeros to a multiple of TP.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from copd_megatron.model.fp8 import SCALE, is_fp8, quantised
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.moe_weights import (
    STORAGES,
    WHOLE,
    MoeShard,
    Storage,
    find_storage,
    moe_pieces,
    moe_shapes,
)
from copd_megatron.model.pieces import Piece
from copd_megatron.model.safetensor_reader import SafetensorReader
from copd_megatron.model.spec import BackboneSpec, Family
from copd_megatron.model.te import rounds_what_is_copied
from copd_megatron.types import UserError

if TYPE_CHECKING:
    from copd_megatron.model.backbone import Backbone

TEXT_PREFIX: dict[Family, str] = {
    "qwen3_vl": "model.language_model.",
    "qwen2_5_vl": "model.language_model.",
    "qwen3": "model.",
    "qwen2": "model.",
    "llama": "model.",
    "qwen3_moe": "model.",
    "qwen3_vl_moe": "model.language_model.",
}
"""What precedes ``embed_tokens``, ``layers`` and ``norm`` in a family's weight names."""

VISION_PREFIX = "model.visual."
HEAD_NAME = "lm_head.weight"
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of buffers that old checkpoints carry and that are recomputed."""


def expected_shapes(spec: BackboneSpec, storage: Storage | None = None) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every text tensor that a checkpoint of this spec must hold.

    A tied head is not among them: it may be left out, and if present must equal the embedding.

    Args:
        storage: of MoE experts; None takes the family's first.
    """
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    prefix = TEXT_PREFIX[spec.family]
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (spec.vocab_size, hidden),
                                          f"{prefix}norm.weight": (hidden,)}
    if not spec.tied_head:
        shapes[HEAD_NAME] = (spec.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q_rows, hidden, spec.qkv_bias),
        "self_attn.k_proj": (kv_rows, hidden, spec.qkv_bias),
        "self_attn.v_proj": (kv_rows, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, q_rows, spec.o_bias),
        "mlp.gate_proj": (ffn, hidden, spec.mlp_bias),
        "mlp.up_proj": (ffn, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, ffn, spec.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    for index in range(spec.num_layers):
        layer = f"{prefix}layers.{index}."
        if spec.is_moe(index):
            shapes |= moe_shapes(spec, f"{layer}mlp.", storage or STORAGES[spec.family][0])
        for name, (rows, cols, bias) in linears.items():
            if not spec.has_linear(index, name.rsplit(".", 1)[1]):
                continue
            shapes[f"{layer}{name}.weight"] = (rows, cols)
            if bias:
                shapes[f"{layer}{name}.bias"] = (rows,)
        shapes |= {f"{layer}{name}.weight": (size,) for name, size in norms.items()}
    return shapes


def check_tensors(spec: BackboneSpec, reader: SafetensorReader) -> None:
    """Raise UserError unless the checkpoint's text tensors are exactly those of ``spec``, names and shapes.

    Reads headers only. Vision tensors are the vision tower's business; see ``model.vision``.
    """
    expected = expected_shapes(spec, stored_as(spec, reader))
    if spec.tied_head and HEAD_NAME in reader.entries:
        expected[HEAD_NAME] = (spec.vocab_size, spec.hidden_size)
    for name, shape in expected.items():
        if reader.shape(name) != shape:
            raise UserError(f"model.path: {reader.entries[name].file}: tensor {name!r} has shape "
                            f"{list(reader.shape(name))}, config.json asks for {list(shape)}; weights and "
                            "config must belong together; copy both anew")
    for name, entry in reader.entries.items():
        vision = spec.is_visual and name.startswith(VISION_PREFIX)
        if name not in expected and not vision and not name.endswith(_NOT_WEIGHTS):
            raise UserError(f"model.path: {entry.file}: tensor {name!r} is unknown; a {spec.family} backbone "
                            "with this config.json has none of that name; use a plain checkpoint of the "
                            "family")


def check_backbone(path: str | Path) -> BackboneSpec:
    """The spec of the backbone in ``path`` after every check that needs no weights: config, files, tensors.

    Raises UserError (``model.path: ...``) for the first thing that is wrong.
    """
    spec = read_spec(path)
    with SafetensorReader(path) as reader:
        check_tensors(spec, reader)
    return spec


def stored_as(spec: BackboneSpec, reader: SafetensorReader) -> Storage | None:
    """How a checkpoint stores its MoE experts; None for dense backbones. UserError if in no way that is known."""
    if spec.moe is None:
        return None
    mlps = [f"{TEXT_PREFIX[spec.family]}layers.{layer}.mlp." for layer in spec.moe.layers]
    return find_storage(spec, mlps, reader.entries)


def layer_pieces(spec: BackboneSpec, layer: int, tp_rank: int, tp: int, moe: MoeShard = WHOLE,
                 storage: Storage | None = None) -> dict[str, list[Piece]]:
    """Pieces of every parameter of TransformerLayer ``layer`` (global index) on one rank, by parameter name.

    ``moe`` and ``storage`` (None: the family's first) matter for MoE layers only.
    """
    spec.check_parallel(tp, 1)
    prefix = f"{TEXT_PREFIX[spec.family]}layers.{layer}."
    ffn = _shard(spec.ffn_hidden_size, tp_rank, tp)
    heads = _shard(spec.num_heads, tp_rank, tp)
    head_cols = slice(heads.start * spec.head_dim, heads.stop * spec.head_dim)
    pieces = {
        "input_layernorm.weight": [Piece(f"{prefix}input_layernorm.weight")],
        "pre_mlp_layernorm.weight": [Piece(f"{prefix}post_attention_layernorm.weight")],
        "self_attention.linear_qkv.weight": list(_qkv_pieces(spec, prefix, "weight", tp_rank, tp)),
        "self_attention.linear_proj.weight": [Piece(f"{prefix}self_attn.o_proj.weight", cols=head_cols)],
    }
    if spec.is_moe(layer):
        pieces |= moe_pieces(spec, f"{prefix}mlp.", moe, storage or STORAGES[spec.family][0])
    else:
        pieces["mlp.linear_fc1.weight"] = [Piece(f"{prefix}mlp.{name}_proj.weight", ffn) for name in ("gate", "up")]
        pieces["mlp.linear_fc2.weight"] = [Piece(f"{prefix}mlp.down_proj.weight", cols=ffn)]
    if spec.qk_norm:
        pieces["self_attention.q_layernorm.weight"] = [Piece(f"{prefix}self_attn.q_norm.weight")]
        pieces["self_attention.k_layernorm.weight"] = [Piece(f"{prefix}self_attn.k_norm.weight")]
    if spec.qkv_bias:
        pieces["self_attention.linear_qkv.bias"] = list(_qkv_pieces(spec, prefix, "bias", tp_rank, tp))
    if spec.o_bias:
        pieces["self_attention.linear_proj.bias"] = [Piece(f"{prefix}self_attn.o_proj.bias")]
    if spec.mlp_bias:
        pieces["mlp.linear_fc1.bias"] = [Piece(f"{prefix}mlp.{name}_proj.bias", ffn)
                                         for name in ("gate", "up")]
        pieces["mlp.linear_fc2.bias"] = [Piece(f"{prefix}mlp.down_proj.bias")]
    return pieces


def vocabulary_piece(spec: BackboneSpec, name: str, tp_rank: int, tp: int) -> Piece:
    """This rank's rows of the embedding or head; past the true vocabulary the rank's table is padding."""
    rows = _shard(spec.padded_vocab_size(tp), tp_rank, tp)
    return Piece(name, slice(min(rows.start, spec.vocab_size), min(rows.stop, spec.vocab_size)))


def _shard(size: int, tp_rank: int, tp: int) -> slice:
    return slice(size * tp_rank // tp, size * (tp_rank + 1) // tp)


def _qkv_pieces(spec: BackboneSpec, prefix: str, kind: str, tp_rank: int, tp: int) -> Iterator[Piece]:
    """[query heads of the group | key head | value head] for each key/value group of this rank."""
    total = spec.kv_groups(tp)
    queries = spec.num_heads // total * spec.head_dim
    groups = _shard(total, tp_rank, tp)
    for group in range(groups.start, groups.stop):
        head = group * spec.num_kv_heads // total
        for name, number, size in (("q", group, queries), ("k", head, spec.head_dim), ("v", head, spec.head_dim)):
            yield Piece(f"{prefix}self_attn.{name}_proj.{kind}", slice(number * size, (number + 1) * size))


def load_backbone_weights(backbone: Backbone, path: str | Path) -> None:
    """Fill this rank's parameters in place from the checkpoint in ``path``, converting to the backbone's
    dtype.

    Each rank reads only its own slices. Every parameter outside the adapter bank must be named by the
    translation and no tensor of the checkpoint may be unknown, so nothing stays uninitialised and nothing is
    left out unnoticed.

    Raises:
        UserError: a file or tensor is missing, truncated, corrupt, misshapen or unknown; the message names
            it.
        ValueError: the backbone has a parameter that the translation does not name, or the reverse.
    """
    spec = backbone.spec
    parameters = _frozen_parameters(backbone)
    with SafetensorReader(path) as reader:
        check_tensors(spec, reader)
        pieces = _stage_pieces(backbone, stored_as(spec, reader))
        if parameters.keys() != pieces.keys():
            both = sorted(parameters.keys() ^ pieces.keys())
            raise ValueError(f"backbone and translation disagree about {both}")
        for name, parameter in parameters.items():
            if is_fp8(parameter):
                scales = backbone.get_buffer(f"{name.rpartition('.')[0]}.{SCALE}")
                _fill_quantised(parameter, scales, pieces[name], reader)
            elif rounds_what_is_copied(parameter):
                _fill_whole(parameter, pieces[name], reader)
            else:
                _fill(parameter, pieces[name], reader, padded=name in _TABLES)
        if spec.tied_head and HEAD_NAME in reader.entries:
            _check_tied(backbone, reader)


_TABLES = ("embedding.weight", "output_weight")
"""Parameters with one row for each token of the padded vocabulary."""


def _frozen_parameters(backbone: Backbone) -> dict[str, torch.nn.Parameter]:
    """Parameters outside the adapter bank by name; a head that is the embedding goes by that name only."""
    tied = backbone.spec.tied_head and backbone.groups.is_first_stage
    return {name: parameter for name, parameter in backbone.named_parameters(remove_duplicate=False)
            if not name.startswith("bank.") and not (tied and name == "output_weight")}


def _stage_pieces(backbone: Backbone, storage: Storage | None) -> dict[str, list[Piece]]:
    """Pieces of every frozen parameter of this rank's stage, by the backbone's parameter names."""
    spec, groups = backbone.spec, backbone.groups
    tp_rank, tp, moe = groups.coords.tp, groups.layout.tp, MoeShard.of(groups.layout, groups.coords)
    prefix = TEXT_PREFIX[spec.family]
    table = vocabulary_piece(spec, f"{prefix}embed_tokens.weight", tp_rank, tp)
    pieces: dict[str, list[Piece]] = {}
    if groups.is_first_stage:
        pieces["embedding.weight"] = [table]
    for position, layer in enumerate(backbone.layer_range):
        for name, parts in layer_pieces(spec, layer, tp_rank, tp, moe, storage).items():
            pieces[f"layers.{position}.{name}"] = parts
    if groups.is_last_stage:
        pieces["final_norm.weight"] = [Piece(f"{prefix}norm.weight")]
        if not spec.tied_head:
            pieces["output_weight"] = [vocabulary_piece(spec, HEAD_NAME, tp_rank, tp)]
        elif not groups.is_first_stage:
            pieces["output_weight"] = [table]
    return pieces


@torch.no_grad()
def _fill(parameter: torch.nn.Parameter, pieces: list[Piece], reader: SafetensorReader, padded: bool) -> None:
    """Copy the pieces below each other into ``parameter``; only a padded table may have rows left, which
    become 0."""
    row = 0
    for piece in pieces:
        values = piece.read(reader)
        parameter[row : row + len(values)].copy_(values)
        row += len(values)
    if row != len(parameter) and not padded:
        raise ValueError(f"{[piece.name for piece in pieces]} give {row} rows for {len(parameter)}")
    parameter[row:] = 0


@torch.no_grad()
def _fill_whole(parameter: torch.nn.Parameter, pieces: list[Piece], reader: SafetensorReader) -> None:
    """The same in one copy, of which Transformer Engine takes the scales."""
    whole = torch.cat([piece.read(reader) for piece in pieces])
    if whole.shape != parameter.shape:
        raise ValueError(f"{[piece.name for piece in pieces]} give {list(whole.shape)} for {list(parameter.shape)}")
    parameter.copy_(whole.to(parameter.device, parameter.dtype))


def _fill_quantised(parameter: torch.nn.Parameter, scales: torch.Tensor, pieces: list[Piece],
                    reader: SafetensorReader) -> None:
    """The same in FP8 rows; whole rows are read even where the rank has some of their columns."""
    row = 0
    for piece in pieces:
        values, rows_scales = quantised(replace(piece, cols=slice(None)).read(reader), piece.cols)
        parameter[row : row + len(values)].copy_(values)
        scales[row : row + len(values)].copy_(rows_scales)
        row += len(values)
    if row != len(parameter):
        raise ValueError(f"{[piece.name for piece in pieces]} give {row} rows for {len(parameter)}")


def _check_tied(backbone: Backbone, reader: SafetensorReader) -> None:
    """A checkpoint may repeat a tied head, but then it must be the embedding."""
    if not backbone.groups.is_last_stage:
        return
    spec, groups = backbone.spec, backbone.groups
    names = (HEAD_NAME, f"{TEXT_PREFIX[spec.family]}embed_tokens.weight")
    head, table = (vocabulary_piece(spec, name, groups.coords.tp, groups.layout.tp) for name in names)
    if not torch.equal(reader.read(head.name, head.rows), reader.read(table.name, table.rows)):
        raise UserError(f"model.path: {reader.path}: config.json ties the head to the embedding, but "
                        f"{HEAD_NAME!r} differs from it; set tie_word_embeddings to false there or drop the "
                        "tensor")
