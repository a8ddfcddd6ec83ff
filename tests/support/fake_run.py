"""A run folder with made-up but plausible numbers, written through the real recorder: test data for reports.

Dynamics follow the paper's picture: rewards saturate, overlap dips in RLVR and recovers in OPD, symmetric KL
does the opposite, deltas are heavy-tailed, experts lose a little away from home and the merged policy wins.
"""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from copd_megatron.config.metrics import MetricsConfig
from copd_megatron.metrics.names import edge_name, pair_name
from copd_megatron.metrics.recorder import Recorder
from copd_megatron.metrics.rollout_writer import RolloutRecord, RolloutWriter
from copd_megatron.metrics.run_info import write_run_info
from copd_megatron.types import Completion, Media, Prompt, Segment, TaskItem

WORDS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", " the", " sum", " is", " so", " we", " count",
         " red", " squares", " moves", " left", " right", " first", " then", " frame", " 3", " 4", " 7",
         " 12", " +", " =", " answer", ":", "\n", " wait", ",", " <b>", " übrig", " check")
"""Token id -> text; one entry looks like HTML, one is not ASCII."""

QUESTIONS = {"text": "What is 7 + 12 modulo 10?", "image": "How many red squares are there?",
             "video": "Which way does the square move?"}


def decode(ids: list[int]) -> str:
    """Text of token ids, special tokens kept."""
    return "".join(WORDS[i] for i in ids)


def make_media(kind: str, seed: int) -> tuple[Media, ...]:
    """A 48x48 image of squares, a 6-frame video of one moving square, or nothing."""
    rng = np.random.default_rng(seed)
    if kind == "image":
        pixels = np.full((48, 48, 3), 245, np.uint8)
        for _ in range(4):
            x, y = rng.integers(0, 36, 2)
            pixels[y:y + 10, x:x + 10] = rng.choice([(210, 40, 40), (40, 90, 210), (40, 160, 80)])
        return (Media("image", pixels),)
    if kind == "video":
        pixels = np.full((6, 48, 48, 3), 25, np.uint8)
        for t in range(6):
            pixels[t, 18:30, 5 * t:5 * t + 12] = (240, 200, 60)
        return (Media("video", pixels),)
    return ()


def make_prompt(domain: str, index: int, visual_tokens: int = 9) -> Prompt:
    """A prompt of ``domain`` (text, image, video; others count as text) with its media."""
    media = make_media(domain, index)
    question = QUESTIONS.get(domain, "Which word comes first?")
    ids = [0, 4, 9, 11, 26] + ([25] * visual_tokens if media else []) + [24, 25, 1, 26, 0, 2]
    visual = np.arange(5, 5 + visual_tokens) if media else np.zeros(0, np.int64)
    item = TaskItem(f"{domain}/train/{index}", [{"role": "user", "content": question}], media, "9")
    length = len(ids)
    return Prompt(item.key, domain, np.array(ids), np.tile(np.arange(length), (3, 1)), length, None, visual,
                  2, f"hash-{domain}-{index}", item)


def make_completion(rng: np.random.Generator, prompt: Prompt, expert: str, sample: int, skill: float,
                    length: int = 40) -> Completion:
    """A completion of random words; right with probability ``skill``."""
    ids = rng.integers(2, len(WORDS), int(rng.integers(length // 2, length + 1))).tolist() + [1]
    logprobs = (-rng.exponential(0.4, len(ids))).tolist()
    right = bool(rng.random() < skill)
    parts = {"accuracy": float(right), "format": float(rng.random() < 0.95)}
    reward = 0.9 * parts["accuracy"] + 0.1 * parts["format"]
    return Completion(prompt, expert, sample, [Segment(ids, "policy", logprobs, logprobs)], "stop",
                      decode(ids[:-1]), reward, parts, "9" if right else "4")


def make_rollouts(rng: np.random.Generator, phase: str, experts: list[str], hub: str, prompts: int = 2,
                  group: int = 4) -> list[RolloutRecord]:
    """Native batches of every expert, and in phase opd the cross batches of a hub topology."""
    records = []
    for expert in experts:
        for index in range(prompts):
            prompt = make_prompt(expert, index)
            for s in range(group):
                completion = make_completion(rng, prompt, expert, s, 0.6)
                records.append(RolloutRecord(completion, phase, float(rng.normal())))
    for teacher, student in hub_edges(experts, hub) if phase == "opd" else ():
        for index in range(prompts):
            prompt = make_prompt(teacher, 100 + index)
            for s in range(group):
                completion = make_completion(rng, prompt, student, s, 0.4)
                delta = rng.standard_t(2, len(completion.token_ids)) * 0.5
                records.append(RolloutRecord(completion, phase, None, {teacher: delta.tolist()}))
    return records


def hub_edges(experts: list[str], hub: str) -> list[tuple[str, str]]:
    """Teacher, student of a hub topology."""
    spokes = [e for e in experts if e != hub]
    return [edge for s in spokes for edge in ((hub, s), (s, hub))]


def fake_run(run_dir: Path, *, experts: tuple[str, ...] = ("text", "image", "video"), cycles: int = 4,
             rl_steps: int = 9, opd_steps: int = 6, stop_at: int | None = None, finished: bool = True,
             evaluate_every: int = 15, lr: float = 2e-3, seed: int = 0, rollout_steps: int = 2) -> Path:
    """Write a whole run folder; ``stop_at`` ends it early (then not finished). Returns ``run_dir``.

    ``rollout_steps``: rollout files are written for the last so many steps of each phase.
    """
    names = list(experts)
    rng = np.random.default_rng(seed)
    total = cycles * (rl_steps + opd_steps)
    last = stop_at or total
    run_dir.mkdir(parents=True, exist_ok=True)
    config = fake_config(names, cycles, rl_steps, opd_steps, evaluate_every, lr, seed)
    (run_dir / "config.json").write_text(json.dumps(config, indent=1))
    write_run_info(run_dir, recipe="examples/tiny_three_experts.py", arguments=["train"], world_size=2,
                   device="cpu, 2 cores")
    phases = [("rlvr" if (s - 1) % (rl_steps + opd_steps) < rl_steps else "opd") for s in range(1, last + 1)]
    shown = {s for p in ("rlvr", "opd")
             for s in [i + 1 for i, q in enumerate(phases) if q == p][-rollout_steps:]}
    writer = RolloutWriter(run_dir, decode)
    drift = 0.0
    evaluation: dict = {}
    with Recorder(run_dir, MetricsConfig(tensorboard=False), strict=True) as recorder:
        for step in range(last + 1):
            if step:
                phase = phases[step - 1]
                drift = max(0.0, drift + (0.011 if phase == "rlvr" else -0.014) + rng.normal(0, 0.002))
                recorder.log(step, phase, fake_values(rng, names, step / total, phase, drift, lr))
                if step in shown:
                    writer.write(step, make_rollouts(rng, phase, names, names[0]))
            if step % evaluate_every == 0 or step == total:
                evaluation = fake_evaluation(rng, names, step / total, 1000 if step == total else 256)
                recorder.log_evaluation(step, evaluation, "greedy", 1)
    if finished and last == total:
        accuracy = {p: {d: c["avg"] for d, c in row.items()} for p, row in evaluation.items()}
        (run_dir / "summary.json").write_text(json.dumps(
            {"policies": accuracy, "held_out": dict.fromkeys(names, 1000), "train_s": 431.7, "seed": seed}))
    return run_dir


def fake_config(experts: list[str], cycles: int, rl_steps: int, opd_steps: int, every: int, lr: float,
                seed: int) -> dict:
    """A resolved config with the sections a report reads."""
    return {"model": {"path": "examples/tiny_backbone"}, "seed": seed,
            "experts": {e: {"task": f"copd_megatron.tasks.{e}:Task"} for e in experts},
            "adapter": {"rank": 16, "alpha": 16, "scope": "sequence", "first_layer": 0},
            "rollout": {"prompts_per_step": 32, "group_size": 8, "temperature": 1.0},
            "opd": {"signal": "sampled", "beta": 1.0}, "exchange": {"topology": "hub", "hub": None},
            "optimizer": {"lr": lr},
            "schedule": {"cycles": cycles, "rl_steps": rl_steps, "opd_steps": opd_steps},
            "merge": {"rule": "uniform"}, "evaluation": {"every": every}}


def fake_values(rng: np.random.Generator, experts: list[str], t: float, phase: str, drift: float,
                lr: float) -> dict[str, float]:
    """Metrics of one step at time ``t`` in [0, 1]."""
    values: dict[str, float] = {}
    for i, e in enumerate(experts):
        accuracy = min(1.0, 0.45 + 0.08 * (i % 3) + 0.4 * (1 - np.exp(-4 * t)) + rng.normal(0, 0.03))
        values |= {
            f"{e}/reward": 0.9 * accuracy + 0.1, f"{e}/reward/accuracy": accuracy, f"{e}/reward/format": 0.99,
            f"{e}/advantage_abs": 0.75 * (1 - 0.6 * t) + rng.normal(0, 0.02),
            f"{e}/zero_std_groups": 0.2 + 0.5 * t,
            f"{e}/length": 22 + 6 * i % 9 + 5 * t + rng.normal(), f"{e}/truncated": abs(rng.normal(0, 0.004)),
            f"{e}/parseable": 0.98, f"{e}/entropy": 0.9 * np.exp(-1.8 * t) + 0.1 + rng.normal(0, 0.02),
            f"{e}/kl_backbone": 0.3 * t + abs(rng.normal(0, 0.01)),
            f"{e}/mismatch_kl": abs(rng.normal(0, 1e-9)),
            f"{e}/grad_norm": 0.4 + abs(rng.normal(0, 0.1)), f"{e}/lr": lr, f"{e}/clip_fraction": 0.0,
            f"{e}/ratio_mean": 1.0, f"{e}/loss": rng.normal(0, 0.01)}
    for i, a in enumerate(experts):
        for b in experts[i + 1:]:
            values[pair_name(a, b, "overlap")] = min(1.0, 0.985 - 0.7 * drift + rng.normal(0, 0.004))
            values[pair_name(a, b, "symmetric_kl")] = 0.01 + 1.4 * drift + abs(rng.normal(0, 0.004))
    if phase == "opd":
        for teacher, student in hub_edges(experts, experts[0]):
            tail = 0.4 + 3 * drift + abs(rng.normal(0, 0.1))
            values |= {edge_name(teacher, student, k): v for k, v in {
                "delta_p05": -2.2 * tail, "delta_p50": -0.02 * tail, "delta_p95": 0.8 * tail,
                "delta_mean": -0.3 * tail, "beta_delta_abs": 0.5 * tail, "teacher_kl": 0.3 * tail,
                "dropped": 0.0,
                "length": 24 + rng.normal(), "truncated": 0.0, "tokens": 2900.0}.items()}
    work = {"rollout": 1.9, "vision": 0.15, "verify": 0.05, "update": 1.6, "other": 0.1}
    if phase == "opd":
        work |= {"rollout": 2.8, "score": 0.6, "exchange": 0.1, "update": 2.2}
    times = {f"time/{k}_s": v * (1 + abs(rng.normal(0, 0.05))) for k, v in work.items()}
    values |= times | {"time/step_s": sum(times.values()), "tokens/rollout_per_s": 9500 + rng.normal(0, 300),
                       "tokens/update_per_s": 14000 + rng.normal(0, 300), "tokens/step": 18000.0,
                       "tokens/saved_share": 0.61 + rng.normal(0, 0.01), "prefix/hit_rate": 0.7,
                       "memory/peak_bytes": 1.4e9}
    return {name: float(value) for name, value in values.items()}


def fake_evaluation(rng: np.random.Generator, experts: list[str], t: float, n: int) -> dict:
    """Policies x domains at time ``t``."""
    def cell(avg: float) -> dict:
        avg = float(np.clip(avg + rng.normal(0, 0.01), 0, 1))
        half = 1.96 * (avg * (1 - avg) / n) ** 0.5
        return {"avg": avg, "pass": avg, "n": n, "low": max(0.0, avg - half), "high": min(1.0, avg + half),
                "parseable": 0.98, "length": 24.0}

    rise = 1 - np.exp(-4 * t)
    base = {d: 0.42 + 0.06 * (i % 3) for i, d in enumerate(experts)}
    policies = {"base": {d: cell(base[d]) for d in experts}}
    for e in experts:
        policies[e] = {d: cell(base[d] + (0.42 if d == e else 0.08) * rise) for d in experts}
    policies["merged"] = {d: cell(base[d] + 0.36 * rise) for d in experts}
    return policies
