"""Every Triton kernel compiles for sm_90, spills nothing and fits a multiprocessor. No GPU is needed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = 227 * 1024
"""What one block may have on sm_90."""
REGISTERS = 65536
"""Of a multiprocessor."""
SCORES, LORA = {"_scores", "_gradient", "_probabilities", "_add_rows"}, {"_multiply", "_outer"}
JOBS = {"prefix_attention 128 bfloat16": {"_forward", "_query_gradient", "_key_gradient"},
        "vocab_topk": {"_collect", "_sort"}, "topk_kl": {"_row"}, "rowwise_fp8": {"_row"}, "linear_logprob": SCORES,
        "linear_logprob 257": SCORES, "grouped_lora": LORA, "grouped_lora 1024": LORA}
"""Jobs of ``support/sm90.py`` and the kernels that they launch."""


@pytest.fixture(scope="module")
def compiled():
    """In a process of its own: this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run([sys.executable, ROOT / "tests/support/sm90.py", *JOBS], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles(compiled):
    assert {job: {row["kernel"] for row in compiled if row["job"] == job} for job in JOBS} == JOBS


def test_kernels_fit_a_multiprocessor_and_spill_nothing(compiled):
    for row in compiled:
        assert row["stack"] == 0 and row["shared"] <= SHARED_BYTES, row
        assert 0 < row["registers"] * row["warps"] * 32 <= REGISTERS, row


def test_attention_multiplies_on_hoppers_matrix_units(compiled):
    attention = [row for row in compiled if row["job"].startswith("prefix_attention")]
    assert attention and all(row["wgmma"] for row in attention)
