"""run.json: the recipe, versions, and one entry per start."""
import json

from copd_megatron.metrics.run_info import package_versions, write_run_info


def start(run_dir, **options):
    write_run_info(run_dir, recipe="recipes/a.py", arguments=["--set", "seed=1"], world_size=2, device="cpu",
                   **options)
    return json.loads((run_dir / "run.json").read_text())


def test_starts_are_listed(tmp_path):
    info = start(tmp_path / "run")
    assert info["recipe"] == "recipes/a.py"
    assert [s["step"] for s in info["starts"]] == [0]
    info = start(tmp_path / "run", resume_step=12)
    assert [s["step"] for s in info["starts"]] == [0, 12]
    assert info["starts"][1]["arguments"] == ["--set", "seed=1"]


def test_resume_without_a_file_and_a_fresh_start_over_one(tmp_path):
    assert len(start(tmp_path, resume_step=3)["starts"]) == 1
    assert len(start(tmp_path)["starts"]) == 1


def test_versions_name_what_is_installed():
    versions = package_versions()
    assert versions["torch"].startswith("2.")
    assert "a package that is not there" not in versions
