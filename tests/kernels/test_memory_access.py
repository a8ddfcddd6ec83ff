"""What every kernel does to memory, program by program: nothing that the interpreter's order of execution hides."""
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from copd_kernels.grouped_lora import triton_impl as grouped_lora
from copd_kernels.grouped_lora.segments import Segments
from copd_kernels.linear_logprob import triton_impl as linear_logprob
from copd_kernels.prefix_attention import tiles
from copd_kernels.prefix_attention import triton_impl as prefix_attention
from copd_kernels.prefix_attention.plan import Plan
from copd_kernels.rowwise_fp8 import triton_impl as rowwise_fp8
from copd_kernels.topk_kl import triton_impl as topk_kl
from copd_kernels.vocab_topk import triton_impl as vocab_topk
from support.watched_memory import watched


def run_vocab_topk(monkeypatch) -> None:
    """Rows that fill the queue in every block, of columns that fill no block."""
    monkeypatch.setattr(vocab_topk, "BLOCK", 16)
    monkeypatch.setattr(vocab_topk, "QUEUE", 16)
    rows = torch.stack([torch.randn(77).sort().values, torch.ones(77), torch.randn(77)])
    vocab_topk.vocab_topk(rows, 7, torch.tensor([[3, -1], [80, 0], [76, 76]]))


def run_topk_kl(monkeypatch) -> None:
    student, teacher = torch.randn(2, 3, 9).log_softmax(2)[:, :, :5].contiguous()
    topk_kl.topk_divergence(student, teacher, teacher[:, 0].clone(), "jsd")


def run_linear_logprob(monkeypatch) -> None:
    """Ids given twice, of other shards, and more of them than are compared at a time."""
    for name, size in (("BLOCK", 8), ("PART", 2), ("WIDE", 16)):
        monkeypatch.setattr(linear_logprob, name, size)
    hidden, head, ids = torch.randn(4, 20), torch.randn(29, 20), torch.randint(-3, 32, (4, 5))
    ids[:, 4] = ids[:, 0]
    scored = linear_logprob.linear_logprob(hidden, head, ids, 0.7, True, True)
    linear_logprob.linear_logprob_backward(hidden, head, ids, 0.7, scored.lse_T, torch.randn(4, 5), scored.entropy_T,
                                           torch.randn(4))
    linear_logprob.picked_gradient(scored.rest_TH, head, ids, -torch.rand(4, 5), torch.randn(4, 5), 0.7)


def run_grouped_lora(monkeypatch) -> None:
    """Three experts, one without rows, in columns of a fused projection; rows shared out over programs."""
    monkeypatch.setattr(grouped_lora, "FEWEST_ROWS", 3)
    segments = Segments.build([slice(0, 70), torch.tensor([75, 71, 74]), slice(90, 90)], torch.device("cpu"))
    x, y = torch.randn(90, 20, requires_grad=True), torch.randn(90, 48, requires_grad=True)
    down, up = ([torch.randn(*shape).requires_grad_() for shape in shapes] for shapes in (
        [(3, 20), (2, 20), (5, 20)], [(24, 3), (24, 2), (24, 5)]))
    h = grouped_lora.grouped_down(x, down, segments)
    grouped_lora.grouped_up(y * 1, h, up, [1.0, 2.0, 3.0], segments, (4, 8, 16)).sum().backward()


def run_prefix_attention(monkeypatch) -> None:
    """Tiles of many spans, of three heads, and keys that several programs share."""
    launch = prefix_attention.Launch(32, 16, 4, 1)
    monkeypatch.setattr(prefix_attention, "SIZES", dict.fromkeys(
        prefix_attention.SIZES, prefix_attention.Launches(launch, launch, launch)))
    monkeypatch.setattr(tiles, "MOST_ROWS", 4)
    spans = [(0, 18, 0, 0), (18, 30, 0, 0), (30, 33, 0, 18), (33, 39, 18, 30), (39, 41, 0, 18), (44, 47, 0, 0)]
    q, k, v = (torch.randn(50, heads, 20, requires_grad=True) for heads in (3, 1, 1))
    prefix_attention.prefix_attention(q, k, v, Plan.build(spans, 50, q.device)).sum().backward()


def run_rowwise_fp8(monkeypatch) -> None:
    """Rows of several blocks and of one, further apart than they are long."""
    monkeypatch.setattr(rowwise_fp8, "BLOCK", 16)
    for size in (37, 9):
        rowwise_fp8.quantise_rows(torch.randn(3, 40)[:, :size], torch.rand(size))


KERNELS = {"vocab_topk": {"_collect", "_sort"}, "topk_kl": {"_row"}, "rowwise_fp8": {"_row"},
           "linear_logprob": {"_scores", "_gradient", "_probabilities", "_add_rows"},
           "grouped_lora": {"_multiply", "_outer"},
           "prefix_attention": {"_forward", "_query_gradient", "_key_gradient", "_add_parts"}}


@pytest.mark.parametrize("kernel", KERNELS)
def test_programs_and_threads_do_not_meet_and_stay_inside_their_tensors(kernel, monkeypatch):
    torch.manual_seed(0)
    with watched() as found:
        globals()[f"run_{kernel}"](monkeypatch)
    assert found == {name: [] for name in KERNELS[kernel]}


@triton.jit
def _no_mask(X, SIZE: tl.constexpr):
    tl.store(X + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32))


@triton.jit
def _sum_of_programs(X):
    tl.store(X, tl.load(X) + 1.0)


@triton.jit
def _neighbours(X):
    tl.store(X + 1 + tl.program_id(0), tl.load(X + tl.program_id(0)))


@triton.jit
def _turned(X, WAIT: tl.constexpr):
    place = tl.arange(0, 4)
    x = tl.load(X + place)
    if WAIT:
        tl.debug_barrier()
    tl.store(X + 3 - place, x)


@triton.jit
def _all_to_one(X):
    tl.store(X + tl.arange(0, 4) // 4, tl.arange(0, 4).to(tl.float32))


@pytest.mark.parametrize("kernel, programs, options, fault", [
    (_no_mask, 1, {"SIZE": 4}, None),
    (_sum_of_programs, 2, {}, "programs write to one address"), (_sum_of_programs, 1, {}, None),
    (_neighbours, 2, {}, "programs read what others write"),
    (_turned, 1, {"WAIT": False}, "threads meet without a barrier"), (_turned, 1, {"WAIT": True}, None),
    (_all_to_one, 1, {}, "stores different values to one address")])
def test_the_watch_sees(kernel, programs, options, fault):
    with watched() as found:
        kernel[(programs,)](torch.zeros(12)[4:8], **options)
    (name, faults), = found.items()
    assert (f"{name}: {fault}" in faults) if fault else not faults


def test_memory_of_others_is_not_touched():
    memory = torch.ones(12)
    with watched(), pytest.raises(InterpreterError, match="_no_mask touches memory outside its tensors"):
        _no_mask[(1,)](memory[4:8], SIZE=8)
    assert memory.all()
