"""`copd score` says what transformers says, on every layout; bad rows and interruptions cost nothing else."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.video_utils import load_video

from copd_megatron.checkpoint.peft import save_peft_adapter
from copd_megatron.config.model import AdapterConfig
from copd_megatron.launch import cli, commands, row_files
from copd_megatron.launch import score as score_module
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import TEXT_PREFIX
from support.policies import make_bank
from support.ranks import run_ranks
from support.tiny_models import FAMILIES, tiny_model

TOLERANCE = 1e-4
"""On log-probs, float32, as the issue of this command asks."""
HEADER = "<|im_start|>assistant\n"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
WATCHED = "<|vision_start|><|video_pad|><|vision_end|>"
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
ODD = {"num_key_value_heads": 1, "tie_word_embeddings": True, "seed": 3}
"""One KV head cannot be cut in two, so TP 1 and PP 2 only."""


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder with two pictures and a video of 3 seconds at 10 frames per second."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.default_rng(0)
    for name, size in (("a.png", (48, 40)), ("b.png", (70, 33))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    with av.open(str(folder / "c.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for shade in range(30):
            frame = np.full((32, 48, 3), 8 * shade, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


def rows_of(family: str) -> list[dict]:
    """Rows that share prompts and rows that do not; texts, chats, and for eyes pictures and a video."""
    rows = [{"prompt": "2 + 3 = ", "completion": text} for text in ("5", "five", " 5<|im_end|>")]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two plus three?"}]
    rows += [{"messages": chat, "completion": text} for text in ("5<|im_end|>", "It is six.")]
    rows.append({"prompt": "2 + 3 = ", "completion": "seven"})
    if family == "qwen3_vl":
        parts = [{"type": "image"}, {"type": "text", "text": " and "}, {"type": "image"}, {"type": "text", "text": "?"}]
        rows += [
            {"messages": [{"role": "user", "content": parts}], "images": ["a.png", "b.png"], "completion": "red"},
            {"messages": [{"role": "user", "content": "<video>where?"}], "videos": ["c.mp4"], "completion": "left"},
            {"prompt": f"{WATCHED}then {SEEN}: ", "images": ["a.png"], "videos": ["c.mp4"], "completion": "right"},
            {"prompt": f"{WATCHED}then {SEEN}: ", "images": ["a.png"], "videos": ["c.mp4"], "completion": "up!"}]
    return rows


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(model: Path, source: Path, target: Path, *options: str) -> int:
    return cli.main(["--traceback", "score", "--model", str(model), "--input", str(source), "--output", str(target),
                     *options])


def on_ranks(count: int, *arguments) -> None:
    """The command on forked ranks, as those that it starts itself."""
    def run():
        os.environ["RANK"] = str(dist.get_rank())
        score_module.leave = lambda: None  # the harness parts from the ranks itself
        assert score(*arguments) == 0

    run_ranks(count, run)


@torch.no_grad()
def transformers_says(path: Path, rows: list[dict], folder: Path, top_k: int, model=None) -> list[dict]:
    """The output rows as transformers computes them, from its own processor on, one row at a time."""
    visual = read_spec(path).is_visual
    if model is None:
        auto = AutoModelForImageTextToText if visual else AutoModelForCausalLM
        model = auto.from_pretrained(path, dtype=torch.float32).eval()
    processor = (AutoProcessor if visual else AutoTokenizer).from_pretrained(path)
    tokenizer = processor.tokenizer if visual else processor
    found = []
    for row in rows:
        text = row.get("prompt")
        if text is None:
            messages = json.loads(json.dumps(row["messages"]).replace('"<video>where?"', json.dumps(
                [{"type": "video"}, {"type": "text", "text": "where?"}])))
            text = tokenizer.apply_chat_template(messages, chat_template=processor.chat_template, tokenize=False,
                                                 add_generation_prompt=True)
        media = {}
        if "images" in row:
            media["images"] = [Image.open(folder / name).convert("RGB") for name in row["images"]]
        if "videos" in row:
            loaded = [load_video(str(folder / name), backend="pyav",
                                 sample_indices_fn=processor.video_processor.sample_frames) for name in row["videos"]]
            media |= {"videos": [frames for frames, _ in loaded], "do_sample_frames": False,
                      "video_metadata": [about for _, about in loaded]}
        inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False, **media)
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion])], 1)
        inputs.pop("attention_mask", None)
        if visual:
            ids = inputs["input_ids"]
            inputs["mm_token_type_ids"] = ((ids == model.config.image_token_id).int()
                                           + 2 * (ids == model.config.video_token_id).int())
        logprobs = model(**inputs).logits[0, length - 1:-1].log_softmax(-1)
        best = logprobs.topk(top_k)
        own = logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]
        found.append({"token_ids": completion, "logprobs": own.tolist(), "sum_logprob": float(own.sum()),
                      "topk_ids": best.indices.tolist(), "topk_logprobs": best.values.tolist()})
    return found


def assert_equal(got: list[dict], want: list[dict], tolerance: float = TOLERANCE) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want):
        assert "error" not in ours, ours
        assert ours["token_ids"] == theirs["token_ids"]
        for name in ("logprobs", "topk_logprobs"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=tolerance)
        assert [ids[0] for ids in ours["topk_ids"]] == [ids[0] for ids in theirs["topk_ids"]]
        assert ours["sum_logprob"] == pytest.approx(theirs["sum_logprob"], abs=tolerance * len(ours["token_ids"]))


@pytest.mark.parametrize("options", [{}, ODD], ids=["", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers_on_every_layout_with_and_without_sharing(family, options, media, tmp_path):
    path, rows = tiny_model(family, **options), rows_of(family)
    want = transformers_says(path, rows, media, top_k=3)
    source = write(media / f"{family}.jsonl", rows)
    for tp, pp in LAYOUTS:
        if tp > options.get("num_key_value_heads", 2):
            continue
        for sharing in ("on", "off") if tp * pp == 1 else ("on",):
            target = tmp_path / f"{tp}_{pp}_{sharing}.jsonl"
            given = ("--tp", str(tp), "--pp", str(pp), "--prefix-sharing", sharing, "--top-k", "3",
                     "--batch-tokens", "400")
            if tp * pp == 1:
                assert score(path, source, target, *given) == 0
            else:
                on_ranks(tp * pp, path, source, target, *given)
            assert_equal(read(target), want)
