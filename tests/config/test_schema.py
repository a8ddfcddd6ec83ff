"""The table of all fields: complete, documented, and good at guessing what was meant."""

import pytest

from copd_megatron.config.model import ModelConfig
from copd_megatron.config.run import RunConfig
from copd_megatron.config.schema import REQUIRED, field_rows, nearest
from copd_megatron.config.tasks import ExpertConfig


def test_every_field_is_documented():
    missing = [row.path for row in field_rows() if not row.doc]
    assert missing == []


def test_rows_without_a_run_show_what_is_required():
    rows = {row.path: row for row in field_rows()}
    assert rows["model.path"].value is REQUIRED
    assert rows["experts.<name>.task"].value is REQUIRED
    assert rows["optimizer.lr"].value == rows["optimizer.lr"].default == 2e-5


def test_rows_of_a_run_show_its_values_beside_the_defaults():
    config = RunConfig(
        model=ModelConfig(path="/b"), experts={"text": ExpertConfig(task="a:B", task_args={"level": 2})}
    )
    config.optimizer.lr = 1e-3
    rows = {row.path: row for row in field_rows(config)}
    assert (rows["optimizer.lr"].value, rows["optimizer.lr"].default) == (1e-3, 2e-5)
    assert rows["experts.text.task_args"].value == {"level": 2}
    assert "experts.<name>.task" not in rows


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rlvr.clip_low", "float >= 0"),
        ("opd.jsd_weight", "float > 0 and < 1"),
        ("rlvr.dual_clip", "float > 1 or null"),
        ("exchange.hub", "str or null"),
        ("rlvr.loss", '"clip" | "gspo" | "cispo"'),
        ("optimizer.betas", "list [float, float]"),
        ("experts.<name>.task_args", "dict"),
        ("exchange.topology", "any value"),
    ],
)
def test_types_read_well(path, text):
    assert next(row.type for row in field_rows() if row.path == path) == text


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("lr", "optimizer.lr"),
        ("rlvr.cliplow", "rlvr.clip_low"),
        ("rl.loss", "rlvr.loss"),
        ("opd.bta", "opd.beta"),
        ("parallel.tensor_parallel", "parallel.tensor"),
        ("schedule.n_cycles", "schedule.cycles"),
    ],
)
def test_nearest_key(written, meant):
    assert nearest(written, [row.path for row in field_rows()]) == meant
