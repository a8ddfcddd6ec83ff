"""``copd doctor``: what is there, what is missing, and what must not be there."""

import sys
from importlib import metadata

import pytest

from copd_megatron.launch import cli, doctor


def write_package(folder, name, version, files=("__init__.py",)):
    """An importable package with metadata."""
    for file in files:
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).touch()
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def finding(name):
    return next(finding for finding in doctor.diagnose() if finding.part == name)


def test_table_of_this_environment(capsys):
    code = cli.main(["doctor"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert metadata.version("torch") in out
    for part in doctor.PARTS:
        assert part.name in out


def test_needed_parts_are_found_and_extras_may_be_absent():
    findings = {finding.part: finding for finding in doctor.diagnose()}
    for part in doctor.PARTS:
        assert findings[part.name].fine
        if part.needed:
            assert findings[part.name].found == metadata.version(part.distribution)


def test_a_missing_needed_part_fails_with_its_install_line(monkeypatch, capsys):
    ghost = doctor.Part("Ghost", "ghost-package", "ghost_package", "haunting")
    monkeypatch.setattr(doctor, "PARTS", (*doctor.PARTS, ghost))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pip install 'ghost-package'" in out
    assert out.endswith("Not in order: Ghost\n")


def test_a_part_outside_its_range_is_not_fine(tmp_path, monkeypatch):
    write_package(tmp_path, "spectre", "0.3")
    monkeypatch.syspath_prepend(tmp_path)
    part = doctor.Part("Spectre", "spectre", "spectre", "haunting")
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["spectre[loud]>=0.6; extra == 'x'"])
    found = doctor._part(part)
    assert (found.found, found.remedy, found.fine) == (
        "0.3, not >=0.6",
        "pip install 'spectre[loud]>=0.6'",
        False,
    )


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("2.11.0a0+nv26.6", True),
        ("2.11.0", True),
        ("2.13.0+cu130", True),
        ("2.10.1", False),
        ("unknown", True),
    ],
)
def test_versions_and_ranges(version, fits):
    assert doctor._in_range(version, ">=2.11") is fits


def test_a_foreign_apex_is_named(tmp_path, monkeypatch):
    assert finding("NVIDIA Apex").fine
    write_package(tmp_path, "apex", "0.9")
    monkeypatch.syspath_prepend(tmp_path)
    found = finding("NVIDIA Apex")
    assert not found.fine
    assert "not NVIDIA's; pip uninstall apex" in found.remedy


def test_transformer_engine_without_cuda_is_named(tmp_path, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    write_package(tmp_path, "transformer_engine", "2.18")
    monkeypatch.syspath_prepend(tmp_path)
    assert not finding("Transformer Engine").fine
    sys.modules.pop("transformer_engine", None)
