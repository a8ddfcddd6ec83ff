"""Slices of Hugging Face tensors become Megatron's layouts; nothing is left out, nothing unknown let in."""
from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from copd_megatron.config.model import AdapterConfig, ModelConfig
from copd_megatron.model.backbone import Backbone
from copd_megatron.model.hf_config import load_hf_config, read_spec
from copd_megatron.model.safetensor_reader import SafetensorReader
from copd_megatron.model.spec import BackboneSpec
from copd_megatron.model.translate import (
    HEAD_NAME,
    TEXT_PREFIX,
    Piece,
    check_backbone,
    expected_shapes,
    layer_pieces,
    load_backbone_weights,
    vocabulary_piece,
)
from copd_megatron.types import UserError
from support.tiny_models import FAMILIES, VISUAL_FAMILIES, VOCABULARY, tiny_model

LAYER = 2
BIASED = {"attention_bias": True, "mlp_bias": True}


def _read(reader: SafetensorReader, pieces: list[Piece]) -> torch.Tensor:
    return torch.cat([reader.read(piece.name, piece.rows, piece.cols) for piece in pieces])


def _fused_qkv(spec: BackboneSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Megatron's layout written down independently: per key/value group [its queries, key, value]."""
    groups = [part.reshape(spec.num_kv_heads, -1, *part.shape[1:]) for part in (q, k, v)]
    return torch.cat(groups, dim=1).flatten(0, 1)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family,options", [("qwen3_vl", {}), ("llama", BIASED)], ids=["qwen3_vl", "llama"])
def test_layer_slices_are_megatrons_layout(family, options, tp):
    path = tiny_model(family, **options)
    spec = read_spec(path)
    with SafetensorReader(path) as reader:
        ranks = [{name: _read(reader, pieces) for name, pieces in layer_pieces(spec, LAYER, rank, tp).items()}
                 for rank in range(tp)]
        whole = {name.split(f"layers.{LAYER}.")[1]: reader.read(name) for name in reader.entries
                 if name.startswith(f"{TEXT_PREFIX[spec.family]}layers.{LAYER}.")}
    for kind in ("weight", "bias") if spec.qkv_bias else ("weight",):
        fused = _fused_qkv(spec, *(whole[f"self_attn.{part}_proj.{kind}"] for part in "qkv"))
        for rank, shard in enumerate(fused.chunk(tp)):
            assert torch.equal(ranks[rank][f"self_attention.linear_qkv.{kind}"], shard)
        for rank in range(tp):
            gate, up = (whole[f"mlp.{part}_proj.{kind}"].chunk(tp)[rank] for part in ("gate", "up"))
            assert torch.equal(ranks[rank][f"mlp.linear_fc1.{kind}"], torch.cat([gate, up]))
    rows = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
    for ours, theirs in rows.items():
        joined = torch.cat([rank[f"{ours}.weight"] for rank in ranks], dim=1)
        assert torch.equal(joined, whole[f"{theirs}.weight"])
        if spec.mlp_bias:
            assert all(torch.equal(rank[f"{ours}.bias"], whole[f"{theirs}.bias"]) for rank in ranks)
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    if spec.qk_norm:
        norms |= {f"self_attention.{part}_layernorm": f"self_attn.{part}_norm" for part in "qk"}
    for ours, theirs in norms.items():
        assert all(torch.equal(rank[f"{ours}.weight"], whole[f"{theirs}.weight"]) for rank in ranks)
    assert sum(len(pieces) for pieces in layer_pieces(spec, LAYER, 0, 1).values()) >= len(whole)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_row_and_column_is_read_once_over_the_ranks(tp):
    """A matrix cut over TP is covered exactly once; norms are whole on every rank, and with 4 ranks each of the two
    key/value heads is on two."""
    path = tiny_model("qwen3")
    spec = read_spec(path)
    counts: Counter[str] = Counter()
    with SafetensorReader(path) as reader:
        for rank in range(tp):
            for layer in range(spec.num_layers):
                for piece in sum(layer_pieces(spec, layer, rank, tp).values(), []):
                    counts[piece.name] += reader.read(piece.name, piece.rows, piece.cols).numel()
        for name in (HEAD_NAME, "model.embed_tokens.weight"):
            for rank in range(tp):
                piece = vocabulary_piece(spec, name, rank, tp)
                counts[name] += reader.read(name, piece.rows).numel()
        counts["model.norm.weight"] = tp * spec.hidden_size
        assert counts.keys() == reader.entries.keys()
        for name, count in counts.items():
            copies = tp if "norm" in name else tp // 2 if tp == 4 and ("k_proj" in name or "v_proj" in name) else 1
            assert count == copies * torch.Size(reader.shape(name)).numel(), name


def test_vocabulary_shards_end_at_the_true_size():
    """26 tokens on 4 ranks: 7, 7, 7 and 5 with two rows of padding; of 5 tokens the last rank holds none."""
    spec = dataclasses.replace(read_spec(tiny_model("qwen3")), vocab_size=26)
    assert [vocabulary_piece(spec, "x", rank, 4).rows for rank in range(4)] == [
        slice(0, 7), slice(7, 14), slice(14, 21), slice(21, 26)]
    small = dataclasses.replace(spec, vocab_size=5)
    assert [vocabulary_piece(small, "x", rank, 4).rows for rank in range(4)] == [
        slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 5)]


@pytest.mark.parametrize("family,options", [
    *((family, {}) for family in FAMILIES), ("llama", BIASED), ("qwen3", {"attention_bias": True}),
    ("qwen3", {"tie_word_embeddings": True}), ("qwen3_vl", {"tie_word_embeddings": False})])
def test_expected_tensors_are_those_of_transformers(family, options):
    path = tiny_model(family, **options)
    auto = AutoModelForImageTextToText if family in VISUAL_FAMILIES else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(load_hf_config(path))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()
              if not name.startswith("model.visual.")}
    assert expected_shapes(read_spec(path)) == theirs
    assert check_backbone(path) == read_spec(path)


def _edited(tmp_path: Path, family: str, edit, **options: object) -> Path:
    """A copy of a tiny checkpoint after ``edit(tensors)``."""
    path = Path(shutil.copytree(tiny_model(family, **options), tmp_path / family))
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


GATE = "model.layers.3.mlp.gate_proj.weight"


@pytest.mark.parametrize("edit,named", [
    (lambda tensors: tensors.pop(GATE), f"{GATE!r} is missing"),
    (lambda tensors: tensors.update({GATE: tensors[GATE][:-1]}), "[47, 32], config.json asks for [48, 32]"),
    (lambda tensors: tensors.update({"model.layers.4.mlp.gate_proj.weight": tensors[GATE]}), "layers.4"),
    (lambda tensors: tensors.update({"score.weight": tensors[GATE]}), "'score.weight' is unknown"),
    (lambda tensors: tensors.pop(HEAD_NAME), f"{HEAD_NAME!r} is missing"),
], ids=["missing", "shape", "extra layer", "unknown", "no head"])
def test_tensors_that_do_not_fit_the_config(tmp_path, edit, named):
    with pytest.raises(UserError, match=r"^model\.path: ") as caught:
        check_backbone(_edited(tmp_path, "qwen3", edit))
    assert named in str(caught.value)


def test_recomputed_buffers_of_old_checkpoints_are_passed_over(tmp_path):
    path = _edited(tmp_path, "llama", lambda tensors: tensors.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert check_backbone(path).family == "llama"


def _backbone(groups, path: Path, dtype: str = "float32") -> Backbone:
    """A backbone whose every parameter is NaN."""
    model = ModelConfig(path=str(path), dtype=dtype)
    backbone = Backbone(read_spec(path), groups, model, AdapterConfig(rank=2))
    backbone.bank.add_expert("only", seed=0)
    adapters = {id(parameter) for parameter in backbone.bank.parameters()}
    for parameter in backbone.parameters():
        if id(parameter) not in adapters:
            parameter.data.fill_(float("nan"))
    return backbone


@pytest.mark.parametrize("tied", [False, True])
def test_loading_fills_everything_and_leaves_adapters(one_rank, tied):
    path = tiny_model("qwen3", tie_word_embeddings=tied)
    backbone = _backbone(one_rank("only"), path, "bfloat16")
    before = {name: p.clone() for name, p in backbone.bank.parameters_of("only").items()}
    load_backbone_weights(backbone, path)
    assert all(torch.isfinite(parameter).all() for parameter in backbone.parameters())
    assert all(torch.equal(p, before[name]) for name, p in backbone.bank.parameters_of("only").items())
    table = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(backbone.embedding.weight, table.bfloat16())
    assert (backbone.output_weight is backbone.embedding.weight) == tied


def test_padding_rows_are_zero(one_rank):
    path = tiny_model("qwen3")
    backbone = _backbone(one_rank("only"), path)
    wider = torch.full((VOCABULARY + 5, backbone.spec.hidden_size), float("nan"))
    backbone.output_weight = torch.nn.Parameter(wider, requires_grad=False)
    load_backbone_weights(backbone, path)
    assert (backbone.output_weight[VOCABULARY:] == 0).all()
    assert (backbone.output_weight[:VOCABULARY] != 0).any()


def test_a_parameter_without_a_translation_is_an_error(one_rank):
    backbone = _backbone(one_rank("only"), tiny_model("qwen3"))
    backbone.layers[1].mlp.register_parameter("gain", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gain"):
        load_backbone_weights(backbone, tiny_model("qwen3"))


def test_a_repeated_tied_head_must_be_the_embedding(one_rank, tmp_path):
    def repeat(tensors: dict[str, torch.Tensor], change: float) -> None:
        tensors[HEAD_NAME] = tensors["model.embed_tokens.weight"] + change

    same, other = (
        _edited(tmp_path / str(change), "qwen3", partial(repeat, change=change), tie_word_embeddings=True)
        for change in (0.0, 0.1))
    backbone = _backbone(one_rank("only"), same)
    load_backbone_weights(backbone, same)
    with pytest.raises(UserError, match="ties the head"):
        load_backbone_weights(backbone, other)
