"""The benchmarks of the kernels: their sides agree, rows are written whole, and nothing is timed without a GPU."""
import csv
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels/benchmarks"
KERNELS = sorted(path.parent.name for path in (ROOT / "kernels/copd_kernels").glob("*/triton_impl.py"))


@pytest.fixture
def load(monkeypatch):
    """A module of the benchmarks' folder by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_every_kernel_has_a_benchmark_of_its_name():
    assert sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "harness") == KERNELS
    script = (ROOT / "tools/gpu_checks.sh").read_text()
    listed = next(line for line in script.splitlines() if line.startswith("KERNELS="))
    assert sorted(listed.removeprefix("KERNELS=(").rstrip(")").split()) == KERNELS


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", KERNELS)
def test_sides_agree_on_small_cases(load, kernel):
    harness, device = load("harness"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = list(load(kernel).cases(True, device))
    for case in cases:
        assert len(case.sides) >= 2 and "triton" in case.sides and case.bytes > 0 and case.flops >= 0
        assert harness.agree(case) < 1e-4
    assert len({case.shape for case in cases}) == len(cases)


def test_share_of_the_roofline_is_that_of_the_narrower_limit(load):
    harness = load("harness")
    roofline = harness.Roofline(bytes_per_s=2e12, flops_per_s={torch.bfloat16: 8e14})
    moved, multiplied = (harness.Case("", torch.bfloat16, {}, size, flops)
                         for size, flops in ((4 * 10**9, 8 * 10**11), (10**9, 8 * 10**12)))
    assert roofline.share(moved, 4e-3) == pytest.approx(0.5)
    assert roofline.share(multiplied, 2e-2) == pytest.approx(0.5)


def test_rows_are_appended_and_other_columns_refused(load, tmp_path):
    harness, path = load("harness"), tmp_path / "results/topk.csv"
    row = dict.fromkeys(harness.COLUMNS, "x") | {"shape": "P=1, R=2", "seconds": 0.5}
    harness.append(path, [row])
    harness.append(path, [row, row])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and tuple(rows[0]) == harness.COLUMNS
    assert rows[2]["shape"] == "P=1, R=2" and float(rows[2]["seconds"]) == 0.5
    assert [file.name for file in path.parent.iterdir()] == ["topk.csv"]
    path.write_text("kernel,seconds\n")
    with pytest.raises(ValueError, match="columns kernel,seconds; kernel,shape,.*; move the file away"):
        harness.append(path, [row])


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")
def test_without_a_gpu_only_agreement_is_checked(load, tmp_path, capsys):
    harness, file = load("harness"), tmp_path / "rows.csv"
    cases = load("topk_kl").cases
    assert harness.main("topk_kl", cases, ["--csv", str(file)]) == 2
    assert "benchmarks: no CUDA device; times are those of a GPU; run topk_kl.py on one" in capsys.readouterr().err
    assert harness.main("topk_kl", cases, ["--csv", str(file), "--check"]) == 0
    assert "topk_kl jsd T=5 K=8 torch.float32: reference, triton agree within" in capsys.readouterr().out
    assert not file.exists()


def test_sides_that_differ_are_an_error(load, capsys):
    harness, one = load("harness"), torch.ones(3)
    case = harness.Case("N=3", torch.float32, {"reference": lambda: [one], "triton": lambda: [1.01 * one]}, 12, 0)
    assert harness.main("ones", lambda small, device: [case], ["--check"]) == 1
    error = capsys.readouterr().err
    assert "N=3: result 0 of triton is 1.0e-02 of its norm away from reference's; at most 1e-03" in error
