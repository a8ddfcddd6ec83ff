"""What is packed is what is read: within rounding, with masses that sum to 1, whatever lies beside it."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.exchange.payload import WIRE, Codec, Signal
from copd_megatron.losses.topk_kl import topk_divergence

VOCABULARY, HIDDEN = 50, 6


def signal_of(kind, tokens, k=8, dtype=torch.float32, sharpness=3.0, seed=0):
    """A teacher's signal over a random vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64)
    logprobs = logits.log_softmax(1)
    own = logprobs[:, 0].to(dtype)
    if kind == "topk":
        values, ids = logprobs.topk(k)
        return Signal("topk", own, ids, values.to(dtype))
    if kind == "full":
        return Signal("full", hidden_TH=torch.randn(tokens, HIDDEN, generator=generator, dtype=dtype))
    return Signal("sampled", own)


def codec_of(kind, wire="float32", k=8, **settings_):
    return Codec(kind, wire, topk=k, hidden_size=HIDDEN, **settings_)


def message_of(codec, signals):
    """What a peer gets, behind a byte of something else."""
    return torch.cat([torch.zeros(1, dtype=torch.uint8), codec.pack(signals)])[1:]


def tensors_of(signal):
    return {name: value for name, value in vars(signal).items() if isinstance(value, torch.Tensor)}


def assert_same(left, right):
    assert left.kind == right.kind and tensors_of(left).keys() == tensors_of(right).keys()
    for name, value in tensors_of(left).items():
        other = tensors_of(right)[name]
        assert value.dtype == other.dtype and torch.equal(value, other), name


@pytest.mark.parametrize("wire", WIRE)
@pytest.mark.parametrize("kind", ["sampled", "topk", "full"])
@pytest.mark.parametrize("lengths", [[], [1], [3, 0, 1, 5]])
def test_a_batch_reads_as_its_signals_rounded_one_by_one(kind, wire, lengths):
    codec = codec_of(kind, wire, k=7)  # odd, so that not every column is aligned
    signals = [signal_of(kind, length, k=7, seed=seed) for seed, length in enumerate(lengths)]
    message = message_of(codec, signals)
    assert message.dtype == torch.uint8 and message.shape == (sum(lengths) * codec.bytes_per_token(),)
    read, together = codec.unpack(message, lengths), codec.round(signals)
    assert len(read) == len(together) == len(signals)
    for signal, back, rounded in zip(signals, read, together):
        assert_same(back, rounded)
        assert_same(back, *codec.round([signal]))
        if kind != "full":
            assert torch.equal(back.logprobs_T, signal.logprobs_T)  # the sampled log-prob is never narrowed
        if kind == "topk":
            assert torch.equal(back.topk_ids_TK, signal.topk_ids_TK)


def test_bytes_per_token():
    assert codec_of("sampled", "bfloat16").bytes_per_token() == 4
    assert Codec("topk", "bfloat16", topk=64).bytes_per_token() == 4 + 64 * (4 + 2) + 4
    assert Codec("topk", "float32", topk=64).bytes_per_token() == 4 + 64 * (4 + 4) + 4
    assert Codec("full", "bfloat16", hidden_size=4096).bytes_per_token() == 2 * 4096


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(WIRE)), st.integers(1, VOCABULARY), st.floats(0.01, 60), st.integers(0, 10**6))
def test_masses_sum_to_one_and_the_tail_is_the_teachers(wire, k, sharpness, seed):
    signal = signal_of("topk", 16, k=k, sharpness=sharpness, seed=seed)
    back = codec_of("topk", wire, k=k).round([signal])[0]
    head = back.topk_logprobs_TK.double().exp().sum(1)
    tail = back.log_tail_T.double().exp()
    assert not back.log_tail_T.isnan().any()
    torch.testing.assert_close(head + tail, torch.ones(16, dtype=torch.float64), atol=1e-6, rtol=0)
    truth = (1 - signal.topk_logprobs_TK.double().exp().sum(1)).clamp_min(0)
    torch.testing.assert_close(tail, truth, atol=1e-12, rtol=1e-5)
    limit = {"float32": 1e-6, "bfloat16": 2**-7}[wire]  # half a unit of the value, and half of the scale
    torch.testing.assert_close(back.topk_logprobs_TK, signal.topk_logprobs_TK, atol=limit, rtol=limit)


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 8.0])
def test_a_narrow_wire_hardly_moves_the_divergence(sharpness):
    """The student is the teacher, so that every divergence is 0 but for rounding, however peaked the head.

    With the tail as the rest of the rounded head, some rows would come out above 0.05."""
    logprobs = (sharpness * torch.randn(2000, 500, dtype=torch.float64)).log_softmax(1)
    values, ids = logprobs.topk(32)
    for wire, limit in (("float32", 1e-6), ("bfloat16", 1e-4)):
        back = codec_of("topk", wire, k=32).round([Signal("topk", logprobs[:, 0].float(), ids, values.float())])[0]
        head, tail = back.topk_logprobs_TK.double(), back.log_tail_T.double()
        for kind in ("reverse", "forward", "jsd"):
            assert topk_divergence(values, head, tail, kind).abs().max() < limit


@pytest.mark.parametrize("wire", WIRE)
def test_no_tail_is_minus_infinity_and_adds_nothing(wire):
    ids = torch.tensor([[3], [4]])
    back = codec_of("topk", wire, k=1).round([Signal("topk", torch.zeros(2), ids, torch.zeros(2, 1))])[0]
    assert (back.log_tail_T == -torch.inf).all() and (back.topk_logprobs_TK == 0).all()
    student = torch.zeros(2, 1, requires_grad=True)
    for kind in ("reverse", "forward", "jsd"):
        loss_T = topk_divergence(student, back.topk_logprobs_TK, back.log_tail_T, kind)
        assert (loss_T == 0).all()
        gradient, = torch.autograd.grad(loss_T.sum(), student)
        assert gradient.isfinite().all()


def test_exact_rounds_nothing():
    for kind in ("sampled", "topk", "full"):
        signal = signal_of(kind, 5, dtype=torch.float64)
        back = codec_of(kind, "bfloat16", exact=True).round([signal])[0]
        for name, value in tensors_of(signal).items():
            assert torch.equal(tensors_of(back)[name], value)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="kind full; this codec packs sampled"):
        codec_of("sampled").pack([signal_of("full", 2)])
    with pytest.raises(ValueError, match=r"kind topk hold \(2, 8\); \['tokens', 4\]"):
        codec_of("topk", k=4).pack([signal_of("topk", 2, k=8)])
    with pytest.raises(ValueError, match=r"\(8,\) bytes; signals of lengths \[3\] have \(12,\)"):
        codec_of("sampled").unpack(message_of(codec_of("sampled"), [signal_of("sampled", 2)]), [3])
