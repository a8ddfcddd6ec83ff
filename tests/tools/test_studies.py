"""What the studies read out of run folders."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(TOOLS))
    spec = importlib.util.spec_from_file_location("quickstart_study", TOOLS / "quickstart_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOLS))


def test_gap_is_read_where_phases_meet_and_apart_for_hub_and_spokes(study, tmp_path):
    def row(phase, with_hub, between_spokes):
        return {"phase": phase, "pair/adding/x": 9, "pair/add~sort/overlap": with_hub, "pair/add~cmp/overlap": with_hub,
                "pair/cmp~sort/overlap": between_spokes, "pair/add~sort/symmetric_kl": 1 - with_hub,
                "pair/cmp~sort/symmetric_kl": 1 - between_spokes}

    rows = [row("rlvr", .9, .9), row("rlvr", .6, .5), row("opd", .7, .5), row("opd", .8, .4),
            row("rlvr", .4, .3), row("opd", .6, .2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gap = study.gap_around_opd(tmp_path, "add")
    assert gap["hub/overlap"] == pytest.approx({"before_opd": 0.5, "after_opd": 0.7})
    assert gap["spokes/overlap"] == pytest.approx({"before_opd": 0.4, "after_opd": 0.3})
    assert gap["hub/symmetric_kl"] == pytest.approx({"before_opd": 0.5, "after_opd": 0.3})


def test_gains_are_paired_and_the_table_shows_them(study, tmp_path):
    held_out = {"base": {"add": [0, 0, 0, 1] * 25}, "merged": {"add": [0, 1, 0, 1] * 25}}
    (tmp_path / "held_out.json").write_text(json.dumps(held_out))
    gains = study.gains(tmp_path)
    gain, low, high = gains["merged"]["add"]
    assert gain == pytest.approx(25) and 15 < low < 25 < high < 35
    assert study.table(gains, ["add"]).splitlines()[2].startswith("| merged | +25.0 [+1")


def test_the_language_models_study_reads_its_recipe(study):
    spec = importlib.util.spec_from_file_location("smollm2_study", TOOLS / "smollm2_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from copd_megatron.config.loading import load_recipe

    config = load_recipe(TOOLS.parent / "examples" / "smollm2_three_skills.py")
    assert tuple(config.experts) == module.DOMAINS and config.exchange.hub == module.DOMAINS[0]
    assert Path(config.model.path) == module.BACKBONE
