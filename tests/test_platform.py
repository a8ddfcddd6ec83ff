"""Megatron-Core on whatever is here: the parts that a training step uses, on the CPU if there is no CUDA."""
import logging
import warnings

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module

from copd_megatron import platform
from copd_megatron.parallel.groups import Groups
from copd_megatron.parallel.layout import Layout
from copd_megatron.parallel.placement import Placement
from support.ranks import run_ranks

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is patched where CUDA exists")

ARGUMENTS = {
    "tensor": ([1.0],), "as_tensor": ([1.0],), "full": ((2,), 1.0), "arange": (3,), "linspace": (0, 1, 3),
    "eye": (2,), "randint": (5, (2,)), "randperm": (3,), "full_like": (torch.zeros(2), 1.0),
}


def arguments(name):
    return ARGUMENTS.get(name, (torch.zeros(2),) if name.endswith("_like") else (2,))


def make_groups(tp=1, pp=1):
    layout = Layout.fit(dist.get_world_size(), tp, pp)
    return Groups.create(layout, Placement.build(("only",), layout.replicas))


def make_config(groups, **changes):
    settings = dict(
        num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=32,
        use_cpu_initialization=True, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, pipeline_dtype=torch.float32, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, bias_activation_fusion=False, apply_rope_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, tensor_model_parallel_size=groups.layout.tp,
        pipeline_model_parallel_size=groups.layout.pp)
    return TransformerConfig(**(settings | changes))


def make_layer(groups, number=1, **changes):
    torch.manual_seed(number)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    return build_module(spec, config=make_config(groups, **changes), layer_number=number,
                        pg_collection=groups.pg_collection)


def run_layer(layer, hidden):
    return layer(hidden, attention_mask=torch.ones(1, 1, len(hidden), len(hidden)).triu(1).bool())[0]


@cpu_only
@pytest.mark.parametrize("name", platform.FACTORIES)
@pytest.mark.parametrize("wanted", ["cuda", "cuda:1", torch.device("cuda")])
def test_tensors_for_cuda_land_on_the_cpu(name, wanted):
    assert getattr(torch, name)(*arguments(name), device=wanted).device == platform.CPU


@cpu_only
def test_other_devices_are_respected():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).cuda().device == platform.device() == platform.CPU
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    assert platform.default_backend() == "gloo"


@cpu_only
def test_setting_up_again_changes_nothing():
    before = {name: getattr(torch, name) for name in platform.FACTORIES}
    platform.setup_platform()
    assert before == {name: getattr(torch, name) for name in platform.FACTORIES}
    assert not torch.cuda.is_available(), "the shim answers questions; it does not pretend that CUDA exists"


@cpu_only
def test_only_megatron_sees_cuda_type_names():
    weight = torch.zeros(2, dtype=torch.bfloat16)
    assert weight.type() == "torch.BFloat16Tensor"
    assert weight.type(torch.float32).dtype == torch.float32
    inside = {"__name__": "megatron.core.any", "weight": weight}
    assert eval("weight.type()", inside) == "torch.cuda.BFloat16Tensor"


@cpu_only
def test_streams_and_events_are_trivial():
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record()
        torch.ones(1).record_stream(stream)
    stream.wait_event(stream.record_event())
    event.wait()
    torch.cuda.synchronize()
    assert event.query() and stream.query()


def test_notices_are_dropped_and_others_kept(caplog):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        platform._silence_notices()
        warnings.warn("Transformer Engine and Apex are not installed. Falling back", stacklevel=1)
        warnings.warn("Apex is not installed. Falling back", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(notice.message) for notice in shown] == ["something else"]
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.warning("CPU RNG state changed within GPU RNG context")
    logger.warning("something else")
    assert caplog.messages == ["something else"]
    assert len(logger.filters) == 1, "silencing twice adds one filter"


def test_rng_tracker_keeps_streams_apart(one_rank):
    one_rank("a")
    tracker = megatron_random.get_cuda_rng_tracker()
    torch.manual_seed(5)
    expected = torch.rand(4)
    states = tracker.get_states()
    torch.manual_seed(5)
    with tracker.fork():
        first = torch.rand(2, device="cuda")
    with tracker.fork():
        second = torch.rand(2, device="cuda")
    assert torch.equal(torch.rand(4), expected), "the tracker's draws leave the outer generator alone"
    assert not torch.equal(first, second)
    tracker.set_states(states)
    with tracker.fork():
        assert torch.equal(torch.rand(2, device="cuda"), first)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointed_layer_has_the_same_gradients(one_rank, dropout):
    layer = make_layer(one_rank("a"), hidden_dropout=dropout, attention_dropout=dropout).to(platform.device())
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        hidden = torch.randn(5, 2, 16).to(platform.device()).requires_grad_()
        layer.zero_grad()
        if checkpointed:
            out = tensor_parallel.checkpoint(lambda h: run_layer(layer, h), False, hidden)
        else:
            out = run_layer(layer, hidden)
        out.square().mean().backward()
        gradients.append([hidden.grad.clone()] + [p.grad.clone() for p in layer.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def copy_shards(layer, weights, groups):
    """Load this rank's shards of whole weights; fc1 holds [gate shard | up shard], qkv whole query groups."""
    at, size = groups.coords.tp, groups.layout.tp
    for name, weight in layer.named_parameters():
        source = weights[name]
        if "linear_fc1" in name:
            source = torch.cat([half.chunk(size)[at] for half in source.chunk(2)])
        elif "linear_qkv" in name:
            source = source.chunk(size)[at]
        elif "linear_proj" in name or "linear_fc2" in name:
            source = source.chunk(size, dim=1)[at]
        weight.data.copy_(source)


def tensor_parallel_layer(weights, hidden):
    groups = make_groups(tp=dist.get_world_size())
    layer = make_layer(groups)
    copy_shards(layer, weights, groups)
    hidden = hidden.clone().requires_grad_()
    out = run_layer(layer, hidden)
    out.square().mean().backward()
    groups.destroy()
    return out.detach(), hidden.grad


def test_layer_over_two_ranks_equals_one(one_rank):
    layer = make_layer(one_rank("a"))
    hidden = torch.randn(5, 2, 16, requires_grad=True)
    out = run_layer(layer, hidden)
    out.square().mean().backward()
    weights = {name: value.detach().clone() for name, value in layer.named_parameters()}
    for sharded_out, sharded_grad in run_ranks(2, tensor_parallel_layer, weights, hidden.detach()):
        torch.testing.assert_close(sharded_out, out.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sharded_grad, hidden.grad, rtol=1e-5, atol=1e-7)


def one_optimizer_step(distributed_optimizer):
    """One clipped Adam step of Megatron's optimizer on a linear layer, data parallel over all ranks."""
    groups = make_groups()
    config = make_config(groups)
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 4, bias=False)
    model.config = config
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(
        overlap_grad_reduce=False, use_distributed_optimizer=distributed_optimizer), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=0.1, weight_decay=0.0, clip_grad=0.5, bf16=False, params_dtype=torch.float32,
        use_distributed_optimizer=distributed_optimizer), [ddp], use_gloo_process_groups=False)
    ddp.zero_grad_buffer()
    ddp(rows(dist.get_rank())).square().sum().backward()
    finalize_model_grads([ddp])
    _, norm, _ = optimizer.step()
    groups.destroy()
    return float(norm), model.weight.detach()


def rows(rank):
    return torch.arange(8.0).reshape(2, 4).sin() + rank


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_gradients_are_averaged_and_clipped_over_ranks(distributed_optimizer):
    torch.manual_seed(3)
    reference = torch.nn.Linear(4, 4, bias=False)
    (sum(reference(rows(rank)).square().sum() for rank in range(2)) / 2).backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    torch.optim.Adam(reference.parameters(), lr=0.1).step()
    for got_norm, weight in run_ranks(2, one_optimizer_step, distributed_optimizer):
        assert got_norm == pytest.approx(float(norm), rel=1e-5)
        torch.testing.assert_close(weight, reference.weight.detach(), rtol=1e-4, atol=1e-5)


class Stage(torch.nn.Module):
    """One transformer layer that Megatron's pipeline schedule can feed."""

    def __init__(self, groups):
        super().__init__()
        self.config = make_config(groups)
        self.layer = make_layer(groups, groups.coords.pp + 1)
        self.received = None

    def set_input_tensor(self, tensor):
        self.received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(self, hidden):
        return run_layer(self.layer, hidden if self.received is None else self.received)


def pipeline_step(microbatches):
    groups = make_groups(pp=dist.get_world_size())
    stage = Stage(groups)

    def forward_step(data, model):
        return model(next(data)), lambda out: (out.square().mean(), {"loss": out.square().mean().detach()})

    losses = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter(microbatches), model=[stage],
        num_microbatches=len(microbatches), seq_length=microbatches[0].shape[0],
        micro_batch_size=microbatches[0].shape[1], forward_only=False)
    grads = {name: weight.grad for name, weight in stage.named_parameters()}
    groups.destroy()
    return [entry["loss"].item() for entry in losses], grads


def test_pipeline_of_two_stages_equals_one_rank(one_rank):
    microbatches = [torch.randn(5, 2, 16) for _ in range(3)]
    groups = one_rank("a")
    layers = [make_layer(groups, 1), make_layer(groups, 2)]
    losses = [run_layer(layers[1], run_layer(layers[0], x)).square().mean() for x in microbatches]
    (sum(losses) / len(losses)).backward()
    first, last = run_ranks(2, pipeline_step, microbatches)
    assert first[0] == []
    assert last[0] == pytest.approx([loss.item() for loss in losses], rel=1e-5)
    for layer, (_, grads) in zip(layers, (first, last)):
        for name, weight in layer.named_parameters():
            torch.testing.assert_close(grads[f"layer.{name}"], weight.grad, rtol=1e-4, atol=1e-7)


WHOLE = torch.arange(12.0).reshape(4, 3)


def sharded(rank, size, values):
    mine = values.chunk(size)[rank].clone()
    return {"weight": ShardedTensor.from_rank_offsets("weight", mine, (0, rank, size))}


def save_checkpoint(folder):
    groups = make_groups()
    dist_checkpointing.save(sharded(groups.rank, dist.get_world_size(), WHOLE), str(folder))
    groups.destroy()


def load_checkpoint(folder):
    groups = make_groups()
    wanted = sharded(groups.rank, dist.get_world_size(), torch.zeros(4, 3))
    loaded = dist_checkpointing.load(wanted, str(folder))
    groups.destroy()
    return loaded["weight"]


def test_checkpoint_saved_by_two_ranks_is_loaded_by_one_and_four(tmp_path):
    run_ranks(2, save_checkpoint, tmp_path)
    for size in (1, 4):
        assert torch.equal(torch.cat(run_ranks(size, load_checkpoint, tmp_path)), WHOLE)


@cpu_only
def test_megatron_may_be_imported_first(monkeypatch):
    """Sorted imports put Megatron first; its copy of torch's queue, which never runs, is then replaced."""
    monkeypatch.setattr(megatron_random, "_lazy_call", lambda callback: None)
    platform._answer_generator_questions()
    state = torch.get_rng_state()
    first = torch.rand(1)
    megatron_random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(1), first)
