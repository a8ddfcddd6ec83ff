"""The exchange benchmark: what it writes, that its bytes are those of the format, and that it looks at what arrives."""
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from copd_megatron.exchange.payload import Codec

TOOL = Path(__file__).resolve().parents[2] / "tools/bench_exchange.py"
SMALL = ["--vocabulary", "600", "--topk", "4", "--tokens", "200", "--hidden", "8", "--rank", "2", "--repeats", "1",
         "--ranks", "2"]


def run(arguments, before: str = "") -> subprocess.CompletedProcess:
    """The tool in an interpreter of its own: it forks its ranks, which must not inherit threads and process groups of
    other tests. ``before``: code that runs when ``bench_exchange`` has been imported."""
    code = f"import sys; sys.path.insert(0, {str(TOOL.parent)!r}); import bench_exchange as bench\n{before}\n" \
           f"sys.exit(bench.main({arguments!r}))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_exchange", TOOL)
    module = sys.modules["bench_exchange"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("bench_exchange", "exchange_world"):
        del sys.modules[name]


def test_rows_say_what_moved_and_how_long_it_took(tmp_path):
    file = tmp_path / "new" / "exchange.json"
    done = run([*SMALL, "--experts", "2", "3", "--topologies", "hub", "full", "--json", str(file)])
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = result["rows"]
    assert len(rows) == 2 * (2 * 2 + 3)
    for row in rows:
        assert row["bytes_per_token"] == row["step_bytes"] / row["crossing_tokens"] > 0
        assert min(row["seconds"], row["gather_object_s"], row["all_gather_s"]) > 0
        assert row["full_vocab_bytes_per_token"] == 2 * 600 and row["ranks"] == 2
        if row["transport"] == "scatter":  # payload, the tokens asked about, a little of each request; ids twice
            payload = Codec(row["signal"], "bfloat16", 4, 8).bytes_per_token() + 4
            payload += 4 * 4 * (row["signal"] == "student_topk")
            assert payload < row["bytes_per_token"] < payload + 8
    pair = {row["signal"]: row for row in rows if row["experts"] == 2 and row["topology"] == "hub"
            and row["transport"] == "scatter"}
    assert set(pair) == {"sampled", "topk", "student_topk", "full"}
    assert pair["topk"]["crossing_tokens"] == 2 * 200
    gathered = [row for row in rows if row["transport"] == "gather_adapters"]
    # e0 and e1 teach each other; of three experts e0 and e1 share a replica, so that hub and full differ.
    assert [row["step_bytes"] / row["adapter_bytes"] for row in gathered] == [2, 2, 2, 3]
    assert result["machine"]["cores"] and result["arguments"]["topk"] == 4 and result["exponents"]
    assert "bytes grow as" in done.stdout


OFF = """
from dataclasses import replace
signal = bench.World.signal

def off(self, request):
    said = signal(self, request)
    wrong = said.topk_logprobs_TK.clone()
    wrong[:, 1] += 0.05
    return replace(said, topk_logprobs_TK=wrong) if request.teacher == "e2" else said

bench.World.signal = off
"""


def test_what_arrives_is_compared_with_the_dense_distribution(tmp_path):
    file = tmp_path / "exchange.json"
    done = run([*SMALL, "--experts", "2", "3", "--signals", "topk", "--topologies", "ring", "--json", str(file)], OFF)
    assert done.returncode == 1 and "off the dense one" in done.stderr
    # A run that ends early leaves its rows.
    assert [(row["experts"], row["transport"]) for row in json.loads(file.read_text())["rows"]] == [
        (2, "scatter"), (2, "gather_adapters")]
    assert [path.name for path in tmp_path.iterdir()] == ["exchange.json"]


def test_the_fit_finds_the_exponent(bench):
    rows = [{"experts": n, "ranks": 4, "signal": "topk", "topology": "full", "transport": "scatter",
             "step_bytes": 7 * n ** 2} for n in (4, 8, 16)]
    rows.append(rows[0] | {"experts": 2, "ranks": 2, "step_bytes": 10**9})
    assert list(bench.growth(rows)) == [("full", "scatter", pytest.approx(2.0))]


@pytest.mark.parametrize("arguments", [["--experts", "1"], ["--ranks", "1"], ["--tokens", "0"], ["--topk", "601"],
                                       ["--topologies", "none"], ["--signals", "logits"], ["--wire-dtype", "int8"]])
def test_impossible_arguments_are_refused(bench, arguments):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--vocabulary", "600", *arguments])
    assert stop.value.code == 2


def test_a_wrong_transfer_is_seen(bench):
    """Ids, log-probs, tail and hidden states are all looked at."""
    world = bench.World.draw(600, 4, 8)
    for kind in ("sampled", "topk", "student_topk", "full"):
        request = bench.ScoreRequest("e0", "e1", 0, (5, 77, 300), kind)
        good, = Codec(kind, "float32", 4, 8).round([world.signal(request)])
        world.check(request, good, 1e-5)
        for name, value in vars(good).items():
            if isinstance(value, torch.Tensor):
                damaged = value.clone()
                damaged[1] = damaged[1] + 1
                with pytest.raises(ArithmeticError):
                    world.check(request, replace(good, **{name: damaged}), 1e-5)
