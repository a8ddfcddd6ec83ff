"""What the experts of the exchange benchmark say: a random head's distributions, made by the trainer's own scoring
and, to compare with, densely by log-softmax and top-k; and adapters whose contents are known.

Used by `bench_exchange.py`; put `kernels/` and the repository's root on the path first.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.config.model import AdapterConfig
from copd_megatron.exchange.payload import Signal
from copd_megatron.exchange.request import ScoreRequest
from copd_megatron.losses.topk_kl import log_tail
from copd_megatron.model.adapter_bank import AdapterBank
from copd_megatron.model.spec import BackboneSpec, RopeSpec
from copd_megatron.model.vocab_parallel import Head, score
from copd_megatron.parallel.groups import Groups

STATES = 256
"""Different hidden states; every token of a completion is at one of them, which one depends on the teacher."""
HEAD_HIDDEN = 64
"""Hidden size of the head that makes the logits; that of signal `full` is --hidden."""

@dataclass(frozen=True)
class World:
    """What all ranks know: the teachers' dense distributions and what scoring made of them."""

    dense_MV: Tensor
    """Log-softmax over the vocabulary at every state."""
    targets_M: Tensor
    """The token that was sampled there."""
    best_ids_MK: Tensor
    """Dense top-k."""
    scored_logprobs_M: Tensor
    scored_ids_MK: Tensor
    scored_topk_MK: Tensor
    """Of the chunked, fused scoring that the trainer uses."""
    hidden_MH: Tensor

    @classmethod
    def draw(cls, vocabulary: int, k: int, hidden: int) -> World:
        """From a random head: peaked, as language models are."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(vocabulary, HEAD_HIDDEN, generator=generator)
        states = torch.randn(STATES, HEAD_HIDDEN, generator=generator) * 0.35
        targets = torch.randint(vocabulary, (STATES,), generator=generator)
        scores = score(states, Head(weight, 0, vocabulary, chunk_tokens=64), targets, topk=k)
        dense = (states @ weight.T).log_softmax(1)
        return cls(dense, targets, dense.topk(k, 1).indices, scores.logprobs_T, scores.topk_ids_TK,
                   scores.topk_logprobs_TK, torch.randn(STATES, hidden, generator=generator))

    def states(self, expert: str, request: ScoreRequest) -> Tensor:
        """[T] state of an expert at each token of a completion."""
        return (torch.tensor(request.token_ids) + 37 * int(expert[1:])) % STATES

    def student_ids(self, request: ScoreRequest) -> Tensor | None:
        """[T, K] the student's own top-k, for signal `student_topk`."""
        return self.best_ids_MK[self.states(request.student, request)] if request.kind == "student_topk" else None

    def signal(self, request: ScoreRequest) -> Signal:
        """What the teacher says."""
        at = self.states(request.teacher, request)
        if request.kind == "full":
            return Signal("full", hidden_TH=self.hidden_MH[at])
        own = self.scored_logprobs_M[at]
        if request.kind == "topk":
            return Signal("topk", own, self.scored_ids_MK[at], self.scored_topk_MK[at])
        if request.kind == "student_topk":
            ids = self.student_ids(request)
            return Signal("student_topk", own, ids, self.dense_MV[at[:, None], ids])
        return Signal("sampled", own)

    def check(self, request: ScoreRequest, signal: Signal, tolerance: float) -> None:
        """Raises ArithmeticError unless a received signal is what the dense distribution says."""
        at = self.states(request.teacher, request)
        pairs = [] if request.kind == "full" else [(signal.logprobs_T, self.dense_MV[at, self.targets_M[at]])]
        if request.kind in ("topk", "student_topk"):
            ids = self.best_ids_MK[at] if request.kind == "topk" else self.student_ids(request)
            if not torch.equal(signal.topk_ids_TK, ids):
                raise ArithmeticError(f"{request.kind}: other ids than the dense top-k arrived")
            dense = self.dense_MV[at[:, None], ids]
            pairs.append((signal.topk_logprobs_TK, dense))
            if signal.log_tail_T is not None:
                pairs.append((signal.log_tail_T.exp(), log_tail(dense.double()).exp().float()))
        if request.kind == "full":
            pairs.append((signal.hidden_TH, self.hidden_MH[at]))
        for given, wanted in pairs:
            if given.shape != wanted.shape or not torch.allclose(given, wanted, tolerance, tolerance):
                raise ArithmeticError(f"{request.kind}: {(given - wanted).abs().max():.1e} off the dense one")


def factor_of(expert: str, shape: tuple[int, int]) -> Tensor:
    """Contents of an adapter factor, a function of the expert and the shape."""
    return (torch.arange(shape[0] * shape[1], dtype=torch.float32) * 1e-3 + int(expert[1:])).view(shape)


def make_bank(groups: Groups, layers: int, rank: int) -> AdapterBank:
    """The hosted experts' adapters, of a 4B model's width."""
    spec = BackboneSpec(family="qwen3", num_layers=layers, hidden_size=2560, ffn_hidden_size=9728,
                        num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=151936, norm_eps=1e-6,
                        rope=RopeSpec(1e6), qk_norm=True, qkv_bias=False, o_bias=False, mlp_bias=False,
                        tied_head=True, deepstack_layers=0)
    bank = AdapterBank(spec, AdapterConfig(rank=rank, alpha=float(rank)), groups,
                       range(layers), torch.float32, torch.device("cpu"))
    for expert in groups.hosted:
        bank.put(expert, {name: factor_of(expert, bank.local_shape(name, rank))
                          for name in bank.factor_names()}, 1.0)
    return bank
