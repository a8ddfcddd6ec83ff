"""`copd score` says what transformers says, on every layout; bad rows and interruptions cost nothing else."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import av
import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.video_utils import load_video

from copd_megatron.checkpoint.adapter import Adapter
from copd_megatron.checkpoint.peft import full_factors, save_peft_adapter
from copd_megatron.config.model import AdapterConfig
from copd_megatron.launch import cli, row_files
from copd_megatron.launch import score as score_module
from copd_megatron.model.hf_config import read_spec
from copd_megatron.model.prompt import PromptEncoder
from copd_megatron.model.translate import TEXT_PREFIX
from support.policies import make_bank
from support.ranks import run_ranks
from support.smollm2 import smollm2
from support.tiny_models import FAMILIES, MOE_FAMILIES, VISUAL_FAMILIES, tiny_model

TOLERANCE = 1e-4
"""On log-probs, float32, as the issue of this command asks."""
HEADER = "<|im_start|>assistant\n"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
WATCHED = "<|vision_start|><|video_pad|><|vision_end|>"
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
ODD = {"num_key_value_heads": 1, "tie_word_embeddings": True, "seed": 3}
"""One KV head, which both tensor-parallel ranks hold."""


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
    if family in VISUAL_FAMILIES:
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


def on_ranks(count: int, *arguments, command=score) -> None:
    """The command on forked ranks, as those that it starts itself."""
    def run():
        os.environ["RANK"] = str(dist.get_rank())
        score_module.leave = lambda: None  # the harness parts from the ranks itself
        assert command(*arguments) == 0

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
                                 sample_indices_fn=partial(processor.video_processor.sample_frames, fps=2))
                      for name in row["videos"]]
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


@pytest.mark.parametrize(("family", "options"), [*((family, {}) for family in (*FAMILIES, *MOE_FAMILIES)),
                                                 ("qwen3_vl", ODD), ("llama", ODD)])
def test_scores_equal_transformers_on_every_layout_with_and_without_sharing(family, options, media, tmp_path):
    path, rows = tiny_model(family, **options), rows_of(family)
    want = transformers_says(path, rows, media, top_k=3)
    source = write(media / f"{family}.jsonl", rows)
    for tp, pp in LAYOUTS:
        for sharing in ("on", "off") if tp * pp == 1 else ("on",):
            target = tmp_path / f"{tp}_{pp}_{sharing}.jsonl"
            given = ("--tp", str(tp), "--pp", str(pp), "--prefix-sharing", sharing, "--top-k", "3",
                     "--batch-tokens", "400")
            if tp * pp == 1:
                assert score(path, source, target, *given) == 0
            else:
                on_ranks(tp * pp, path, source, target, *given)
            assert_equal(read(target), want)


def test_replicas_share_the_rows_and_layouts_draw_the_same(tmp_path, monkeypatch):
    path, rows = tiny_model("qwen3"), [*rows_of("qwen3"), {"prompt": 3}]
    source = write(tmp_path / "in.jsonl", rows)
    monkeypatch.setattr(row_files, "WINDOW_ROWS", 3)
    assert score(path, source, tmp_path / "one.jsonl", "--top-k", "2") == 0
    on_ranks(2, path, source, tmp_path / "two.jsonl", "--top-k", "2", "--replicas", "2")
    *one, _ = read(tmp_path / "one.jsonl")
    *two, wrong = read(tmp_path / "two.jsonl")
    assert_equal(two, one, 1e-5)
    assert "error" in wrong

    drawing = ("-n", "2", "--max-tokens", "3", "--dtype", "float64")
    one = generate(path, source, tmp_path / "drawn.jsonl", *drawing)
    for layout in (("--replicas", "2"), ("--tp", "2"), ("--pp", "2")):
        target = tmp_path / f"drawn{layout[0]}.jsonl"
        on_ranks(2, path, source, target, *drawing, *layout, command=lambda *arguments: 0 * len(generate(*arguments)))
        for ours, theirs in zip(read(target), one, strict=True):
            assert [c["token_ids"] for c in ours.get("completions", ())] == [
                c["token_ids"] for c in theirs.get("completions", ())]


WRONG = [
    ("{no json", "no valid JSON"), ([1], "a JSON list was given"), ({"prompt": "a"}, "completion: missing"),
    ({"prompt": "", "completion": "b"}, "no tokens"), ({"completion": "b"}, "prompt: missing"),
    ({"prompt": "a", "messages": [], "completion": "b"}, "messages: prompt and messages were both given"),
    ({"messages": [{"role": "assistant", "content": "c"}], "completion": "b"}, "the last message is the assistant's"),
    ({"prompt": SEEN, "images": ["missing.png"], "completion": "b"}, "images: no file"),
    ({"prompt": "a", "images": ["a.png"], "completion": "b"}, "images: 1 given, but the prompt has 0"),
    ({"messages": [{"role": "user", "content": 3}], "completion": "b"}, "messages: message 0"),
]


def test_wrong_rows_become_error_rows_and_stop_nothing(media, tmp_path, capsys):
    good = {"prompt": "2 + 3 = ", "completion": "5", "id": "mine"}
    source = write(media / "wrong.jsonl", [row for wrong, _ in WRONG for row in (wrong, good)]
                   + [{"prompt": "a", "completion": ""}])
    path = tiny_model("qwen3_vl")
    assert score(path, source, tmp_path / "out.jsonl") == 0
    *rows, empty = read(tmp_path / "out.jsonl")
    for (_, message), row in zip(WRONG, rows[::2]):
        assert message in row["error"] and set(row) == {"error"}
    assert all(row["id"] == "mine" and len(row["logprobs"]) == 1 for row in rows[1::2])
    assert empty == {"token_ids": [], "logprobs": [], "sum_logprob": 0.0}
    assert f"21 rows, {len(WRONG)} of them with errors" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--input", "absent.jsonl"], "--input: absent.jsonl does not exist"),
    (["--input", "EMPTY"], "has no rows"), (["--input", "JUNK"], "is no JSONL file"),
    (["--output", "no/such/folder.jsonl"], "is in no folder that exists"), (["--output", "DONE"], "exists; a new file"),
    (["--model", "absent"], "model.path: absent"), (["--adapter", "absent"], "adapter absent: cannot be read"),
    (["--top-k", "-1"], "--top-k: -1"), (["--top-k", "9999"], "--top-k: 9999; the vocabulary has"),
    (["--fps", "0"], "--fps, --max-frames"),
])
def test_mistakes_are_one_clear_error(options, message, tmp_path, capsys, monkeypatch):
    files = {"EMPTY": "\n", "JUNK": "a,b\n1,2\n", "DONE": "{}\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", [{"prompt": "a", "completion": "b"}])
    given = dict(zip(("--model", "--input", "--output"), (str(tiny_model("qwen3")), str(source), "out.jsonl")))
    given[options[0]] = options[1]
    assert cli.main(["score", *(word for pair in given.items() for word in pair)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*files, "in.jsonl"])
    parallel_state.destroy_model_parallel()


def test_an_interrupted_command_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    path, rows = tiny_model("llama"), [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(7)]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    partial = tmp_path / "out.jsonl.partial"
    assert score(path, source, tmp_path / "whole.jsonl") == 0
    monkeypatch.setattr(row_files, "WINDOW_ROWS", 2)

    def interrupted_after(windows):
        with monkeypatch.context() as patch:
            calls, replace = iter(range(windows)), row_files.replace_file

            def once_too_often(*args):
                if next(calls, None) is None:
                    raise KeyboardInterrupt  # rows are written, but not yet known to be safe
                replace(*args)

            patch.setattr(row_files, "replace_file", once_too_often)
            assert score(path, source, target) == 130
            parallel_state.destroy_model_parallel()

    interrupted_after(2)
    assert not target.exists() and len(read(partial)) == 6
    for options, changed, message in (
            (["--top-k", "1"], None, "was begun with top_k 0, now it is 1"),
            ([], [{"prompt": "other", "completion": "x"}, *rows[1:]], "has changed since")):
        write(source, changed or rows)
        assert cli.main(["score", "--model", str(path), "--input", str(source), "--output", str(target), *options]) == 2
        assert message in capsys.readouterr().err
    write(source, [*rows, {"prompt": "7 + 1 = ", "completion": "8"}])  # a file that has grown is the same file
    partial.write_text(partial.read_text() + '{"torn')
    assert score(path, source, target) == 0
    for ours, whole in zip(read(target), read(tmp_path / "whole.jsonl"), strict=False):
        np.testing.assert_allclose(ours["logprobs"], whole["logprobs"], atol=1e-5)
    assert len(read(target)) == 8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "whole.jsonl"]
    assert score(path, source, target, "--overwrite") == 0


def test_its_own_ranks_stop_when_asked_and_leave_what_is_done(tmp_path):
    """TP 2 by the command itself, interrupted as Ctrl-C does; the rest on one rank."""
    path = tiny_model("llama")
    rows = [{"prompt": f"{n} + 1 = ", "completion": str(n + 1)} for n in range(8000)]
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "copd_megatron", "score", "--model", str(path), "--input", str(source),
               "--output", str(target), "--tp", "2"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    state = tmp_path / "out.jsonl.partial.json"
    while not state.exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(120) == 130
    said = child.stderr.read()
    assert "the same command goes on from there" in said and "Falling back" not in said
    done = json.loads(state.read_text())["rows"]
    assert 0 < done < 8000
    write(source, rows[:done + 10])
    assert score(path, source, target) == 0
    assert len(read(target)) == done + 10 and not any("error" in row for row in read(target))


@pytest.mark.parametrize("scope", ["sequence", "completion"])
def test_adapters_score_as_peft_says(scope, one_rank, tmp_path, monkeypatch):
    path, groups = tiny_model("qwen3"), one_rank("text")
    encoder = PromptEncoder(path)
    section = AdapterConfig(rank=3, alpha=6.0, scope=scope, first_layer=1)
    bank = make_bank(groups, encoder.spec, section)
    header = encoder.invocation_token_ids if scope == "completion" else None
    adapter = Adapter(full_factors(bank, "text"), 2.0, header)
    save_peft_adapter(tmp_path / "adapter", adapter, TEXT_PREFIX["qwen3"], path)
    groups.destroy()
    chat = [{"role": "user", "content": "two plus three?"}]
    rows = [{"messages": chat, "completion": "5<|im_end|>"}, {"messages": chat, "completion": " six"},
            {"prompt": f"any text {HEADER}", "completion": "yes"}]
    wrong = [{"prompt": "no header", "completion": "x"}, {"messages": chat, "completion": f"x{HEADER}y"}]
    source = write(tmp_path / "in.jsonl", rows + wrong)
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), tmp_path / "adapter").eval()
    want = transformers_says(path, rows, tmp_path, 2, model)
    for sharing in ("on", "off"):
        target = tmp_path / f"{sharing}.jsonl"
        assert score(path, source, target, "--adapter", str(tmp_path / "adapter"), "--top-k", "2",
                     "--prefix-sharing", sharing) == 0
        got = read(target)
        assert_equal(got[:3], want)
        if scope == "completion":
            assert "a prompt ends in its invocation tokens" in got[3]["error"]
            assert "it holds the invocation tokens" in got[4]["error"]
    if scope == "completion":
        asked = write(tmp_path / "asked.jsonl", [{k: v for k, v in row.items() if k != "completion"}
                                                 for row in rows + wrong[:1]])
        *drawn, refused = generate(path, asked, tmp_path / "drawn.jsonl", "--adapter", str(tmp_path / "adapter"),
                                   "--max-tokens", "2")
        assert all(len(row["completions"]) == 1 for row in drawn) and len(drawn) == 3
        assert "a prompt ends in its invocation tokens" in refused["error"]


@torch.no_grad()
def test_smollm2_scores_as_transformers_on_200_prompts(tmp_path):
    """A real language model, float32; four rows share each of 10 chats, 190 prompts stand alone."""
    path = smollm2()
    nouns = ("tree", "river", "seven", "music", "the king of France", "oxygen", "a cat", "Paris", "Monday", "red")
    verbs = ("is", "was never", "likes", "needs", "looks like", "is called", "has", "makes", "comes from", "is not",
             "sings to", "fears", "costs", "became", "means", "sees", "and", "will be", "should")
    rows = [{"prompt": f"{noun} {verb}", "completion": " a friend."} for noun in nouns for verb in verbs]
    rows += [{"messages": [{"role": "user", "content": f"{a} or {b}?"}], "completion": text}
             for a, b in zip(nouns, nouns[1:] + nouns[:1]) for text in ("Yes.", " both", f"{a}<|im_end|>", "No\n")]
    source = write(tmp_path / "in.jsonl", rows)
    assert score(path, source, tmp_path / "out.jsonl", "--top-k", "1") == 0
    prompts = {json.dumps([row.get("prompt"), row.get("messages")]) for row in rows}
    assert len(prompts) == 200
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer.padding_side = "right"
    for start in range(0, len(rows), 50):
        own, ours = rows[start:start + 50], read(tmp_path / "out.jsonl")[start:start + 50]
        texts = [row.get("prompt") or tokenizer.apply_chat_template(row["messages"], tokenize=False,
                                                                    add_generation_prompt=True) for row in own]
        asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ids = [prompt + ours["token_ids"] for prompt, ours in zip(asked, ours)]
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        hidden = model.model(**batch).last_hidden_state
        for row, prompt, answer, states in zip(own, asked, ours, hidden):
            assert answer["token_ids"] == tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            length = len(answer["token_ids"])
            logits = model.lm_head(states[len(prompt) - 1:len(prompt) - 1 + length]).log_softmax(-1)
            want = logits.gather(1, torch.tensor(answer["token_ids"])[:, None])[:, 0]
            np.testing.assert_allclose(answer["logprobs"], want, atol=1e-3, rtol=0)
            assert [top for top, in answer["topk_ids"]] == logits.argmax(-1).tolist()


def generate(model: Path, source: Path, target: Path, *options: str) -> list[dict]:
    assert cli.main(["--traceback", "generate", "--model", str(model), "--input", str(source), "--output",
                     str(target), *options]) == 0
    return read(target)


@torch.no_grad()
def test_generate_is_greedy_as_transformers_and_draws_by_row_and_seed(media, tmp_path, monkeypatch):
    path = tiny_model("qwen3_vl")
    rows = [{name: row[name] for name in row if name != "completion"} for row in rows_of("qwen3_vl")]
    source = write(media / "prompts.jsonl", [*rows, {"prompt": 7}])
    greedy = generate(path, source, tmp_path / "greedy.jsonl", "--greedy", "--max-tokens", "5", "--ignore-stop")
    assert "error" in greedy.pop()
    answers = [answer["completions"][0] for answer in greedy]
    # What is most likely at every step, and how likely: asked of transformers with the answers given.
    said = [{**row, "completion": encode_back(path, answer["token_ids"])} for row, answer in zip(rows, answers)]
    for answer, theirs in zip(answers, transformers_says(path, said, media, 1)):
        if answer["token_ids"] == theirs["token_ids"]:  # some byte sequences are no text
            assert answer["token_ids"] == [ids[0] for ids in theirs["topk_ids"]]
            np.testing.assert_allclose(answer["logprobs"], theirs["logprobs"], atol=TOLERANCE)
        assert answer["finish"] == "length" and len(answer["token_ids"]) == 5
    sampled = ("-n", "3", "--max-tokens", "4", "--temperature", "0.7", "--seed", "5")
    drawn = generate(path, source, tmp_path / "a.jsonl", *sampled)
    monkeypatch.setattr(row_files, "WINDOW_ROWS", 3)
    again = generate(path, source, tmp_path / "b.jsonl", *sampled, "--lanes", "4")
    tokens = [[c["token_ids"] for row in answers if "error" not in row for c in row["completions"]]
              for answers in (drawn, again)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 3 * len(rows)
    assert len({str(ids) for ids in tokens[0]}) > len(rows), "rows and samples draw alike"


def encode_back(path: Path, token_ids: list[int]) -> str:
    """Text of token ids, special tokens shown."""
    return AutoTokenizer.from_pretrained(path).decode(token_ids)
