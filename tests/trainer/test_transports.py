"""Whatever brings a teacher's signal - its home, a collective, its adapters - the student learns from the same one."""
import functools
from dataclasses import replace

import pytest
import torch

from copd_megatron.metrics.timers import Timers
from copd_megatron.parallel.collectives import all_gather_objects
from copd_megatron.trainer.build import build_trainer
from copd_megatron.trainer.scoring import Scoring
from copd_megatron.trainer.step_metrics import StepMetrics
from support.ranks import run_ranks
from support.toy_run import randomise, run_steps, toy_config, toy_trainer

EDGES = [{"teacher": "text", "student": "image", "signal": "topk"},
         {"teacher": "image", "student": "text", "signal": "student_topk"},
         {"teacher": "video", "student": "text", "signal": "full"},
         {"teacher": "text", "student": "video", "signal": "sampled"},
         {"teacher": "image", "student": "video", "signal": "student_topk"}]
LAYOUTS = {"3 replicas": (3, 1, 1), "tp2 x 2 replicas": (4, 2, 1),
           "pp2 x 2 replicas": (4, 1, 2)}

TRAINED = {"exchange": {"topology": "full"}, "opd": {"signal": "student_topk", "topk": 4},
           "rlvr": {"minibatches_per_rollout": 2}}


def config_of(tp=1, pp=1, **sections):
    sections = {"exchange": {"topology": EDGES}, "opd": {"topk": 5}, "schedule": {"rl_steps": 0},
                "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 4},
                "optimizer": {"lr": 1e-2, "warmup_steps": 0, "microbatch_tokens": 60},
                "metrics": {"rollouts": False, "overlap_tokens": 1}} | sections
    return toy_config("qwen3", **sections, parallel={"tensor": tp, "pipeline": pp, "debug_checks": True})


def all_signals(config, folder):
    """Signals of one step by transport and wire, of all ranks: key -> tensors; and the numbers of the exchange."""
    trainer = build_trainer(config, folder)
    randomise(trainer)
    edges = trainer.schedule.edges(0)
    samples = trainer.collect(0, edges, StepMetrics(trainer.groups))
    true_codec, found, sums = Scoring._codec, {}, {}
    for wire in ("exact", "bfloat16"):
        # Beside float64 scores even a narrow wire must agree to the last bit: no score lies that near to a border.
        Scoring._codec = true_codec if wire == "exact" else narrow
        for transport in ("scatter", "gather_adapters", "auto"):
            trainer.scoring.transport = transport
            for sample in samples:
                sample.signal = None
            sums[transport] = trainer.scoring.score(samples, 0, edges, Timers())
            assert set(trainer.runner.backbone.bank.slots) == set(trainer.groups.hosted)
            mine = {(s.edge.teacher, s.edge.student, s.completion.prompt.key, s.completion.sample): vars(s.signal)
                    for s in samples if s.edge and s.signal}
            parts = all_gather_objects(mine, trainer.groups.world)
            found[wire, transport] = {key: value for part in parts for key, value in part.items()}
            for part in parts:  # tensor-parallel ranks hold the same bits
                assert all(same(value, found[wire, transport][key], 0) for key, value in part.items())
    Scoring._codec = true_codec
    trainer.groups.destroy()
    return found, sums


def narrow(scoring, kind):
    """The codec of a float32 run."""
    from copd_megatron.exchange.payload import Codec

    spec = scoring.runner.backbone.spec
    return Codec(kind, "bfloat16", scoring._topk(), spec.hidden_size)


def same(left, right, tolerance):
    return left.keys() == right.keys() and all(
        torch.allclose(value, right[name], rtol=0, atol=tolerance) if isinstance(value, torch.Tensor)
        else value == right[name] for name, value in left.items())


@pytest.fixture(scope="module")
def at_home(tmp_path_factory):
    return run_ranks(1, all_signals, config_of(), tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_transport_brings_what_scoring_at_home_says(layout, at_home, tmp_path):
    world, tp, pp = LAYOUTS[layout]
    home, nothing = at_home
    assert not any(nothing.values())
    wanted = home["exact", "scatter"]
    assert {value["kind"] for value in wanted.values()} == {"sampled", "topk", "student_topk", "full"}
    for signals, sums in run_ranks(world, all_signals, config_of(tp, pp), tmp_path, timeout_s=120):
        for (wire, transport), found in signals.items():
            expected = home[wire, "scatter"]
            assert found.keys() == expected.keys()
            for key, value in found.items():
                assert same(value, expected[key], 1e-12 if wire == "exact" else 0), (wire, transport, key)
        counts = {name: value for name, (value, _) in sums["auto"].items()}
        least = min(counts["exchange/scatter_bytes"], counts["exchange/gather_adapters_bytes"])
        assert counts["exchange/moved_bytes"] == least > 0
        for transport in ("scatter", "gather_adapters"):
            assert sums[transport]["exchange/moved_bytes"] == sums[transport][f"exchange/{transport}_bytes"]


@functools.cache
def trained_alone(folder):
    return run_ranks(1, run_steps, config_of(**TRAINED), folder)[0]


@pytest.mark.parametrize("transport", ["scatter", "gather_adapters"])
def test_both_transports_train_as_one_rank(transport, tmp_path, tmp_path_factory):
    alone = trained_alone(tmp_path_factory.getbasetemp() / "alone")
    config = config_of(**TRAINED | {"exchange": {"topology": "full", "transport": transport}})
    result = run_ranks(2, run_steps, config, tmp_path / "two", timeout_s=120)[0]
    assert result["tokens"] == alone["tokens"]
    for expert, factors in alone["adapters"].items():
        for name, factor in factors.items():
            torch.testing.assert_close(result["adapters"][expert][name], factor, rtol=0, atol=1e-8)


def test_k_above_the_vocabulary_is_the_vocabulary(tmp_path):
    """The student's and the teacher's top-k are then the same question, and no mass is left for the tail."""
    config = config_of(exchange={"topology": EDGES[:2]}, opd={"topk": 10**6})
    with toy_trainer(config, tmp_path) as trainer:
        randomise(trainer)
        edges = trainer.schedule.edges(0)
        samples = [s for s in trainer.collect(0, edges, StepMetrics(trainer.groups)) if s.edge]
        dense = []
        for signal in ("topk", "student_topk"):
            for sample in samples:
                sample.edge = replace(sample.edge, signal=signal)
            trainer.scoring.score(samples, 0, [replace(edge, signal=signal) for edge in edges], Timers())
            signals = [s.signal for s in samples]
            dense.append([torch.zeros_like(own.topk_logprobs_TK).scatter(1, own.topk_ids_TK, own.topk_logprobs_TK)
                          for own in signals])
            assert all(s.signal.log_tail_T.exp().max() < 1e-12 for s in samples)
        vocabulary = trainer.runner.backbone.spec.vocab_size
    assert samples and all(part.shape[1] == vocabulary for part in dense[0])
    for ours, students in zip(*dense):
        torch.testing.assert_close(ours, students, rtol=0, atol=1e-12)
