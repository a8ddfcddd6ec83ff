"""``--set``: typed values, every kind of place, and what is refused with which words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_megatron.config.loading import apply_overrides
from copd_megatron.config.model import ModelConfig
from copd_megatron.config.overrides import parse_value
from copd_megatron.config.run import RunConfig
from copd_megatron.config.tasks import ExpertConfig
from copd_megatron.types import UserError


class Puzzle:
    """A task that exists only as this object."""


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(
        model=ModelConfig(path="/backbone"),
        experts={
            "text": ExpertConfig(task=Puzzle(), task_args={"level": 1, "colours": {"red": 2}}),
            "image": ExpertConfig(task="tasks:Image"),
        },
    )


def value_at(config: RunConfig, path: str):
    value = config
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", 7),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("model.prefix_sharing=false", False),
        ("model.prefix_sharing=False", False),
        ("adapter.targets=[q_proj,v_proj]", ("q_proj", "v_proj")),
        ('adapter.targets=["q_proj"]', ("q_proj",)),
        ("rlvr.loss=gspo", "gspo"),
        ("rlvr.dual_clip=3", 3.0),
        ("opd.delta_guard=null", None),
        ("exchange.hub=None", None),
        ("exchange.hub=image", "image"),
        ("exchange.topology=ring", "ring"),
        ("exchange.topology=[[text,image],[image,text]]", [["text", "image"], ["image", "text"]]),
        (
            "exchange.topology=[{teacher: text, student: image, beta: 0.5}]",
            [{"teacher": "text", "student": "image", "beta": 0.5}],
        ),
        ("metrics.wandb_project=2026", "2026"),
        ("metrics.wandb_project=a=b", "a=b"),
        ("experts.text.task_args.level=2", 2),
        ("experts.text.task_args.colours.red=3", 3),
        ("experts.text.task_args.new.deep=[1, 2]", [1, 2]),
        ("experts.text.rewards.accuracy.weight=1", 1.0),
        ("experts.image.task=other:Task", "other:Task"),
    ],
)
def test_value_arrives_typed(config, override, expected):
    changed = value_at(apply_overrides(config, [override]), override.partition("=")[0])
    assert changed == expected
    assert type(changed) is type(expected)


def test_given_run_is_left_alone_and_objects_stay_themselves(config):
    changed = apply_overrides(
        config, ["experts.text.task_args.level=2", "experts.text.task_args.colours.red=9", "seed=1"]
    )
    assert config.experts["text"].task_args == {"level": 1, "colours": {"red": 2}}
    assert config.seed == 0
    assert changed.experts["text"].task is config.experts["text"].task


def test_later_overrides_win_and_order_of_fitting_pairs_is_free(config):
    assert apply_overrides(config, ["seed=1", "seed=2"]).seed == 2
    for order in (
        ["evaluation.samples=4", "evaluation.greedy=false"],
        ["evaluation.greedy=false", "evaluation.samples=4"],
    ):
        assert apply_overrides(config, order).evaluation.samples == 4


def test_whole_sections_and_new_experts(config):
    changed = apply_overrides(config, ['rlvr={"loss": "cispo"}', 'experts.video={"task": "tasks:Video"}'])
    assert (changed.rlvr.loss, changed.rlvr.clip_low) == ("cispo", 0.2)
    assert list(changed.experts) == ["text", "image", "video"]


def test_model_path_from_the_command_line_is_taken_from_the_current_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert apply_overrides(config, ["model.path=other"]).model.path == str(tmp_path / "other")
    assert apply_overrides(config, ["seed=1"]).model.path == "/backbone"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", r"^lr: no such key; nearest: optimizer\.lr;"),
        ("rollout.lr=1", r"nearest: optimizer\.lr"),
        ("rlvr.clip_hi=1", r"nearest: rlvr\.clip_high"),
        ("rlvr_loss=gspo", r"no such key; nearest: \w+"),
        ("experts.text.taskargs.level=1", r"nearest: experts\.text\.task_args"),
        ("experts.txt.task_args.level=1", r"no entry 'txt'; there are text, image; nearest: text"),
        (
            "rollout.temperature=hot",
            r"^rollout\.temperature: 'hot' given; allowed: float > 0; the default is 1\.0",
        ),
        ("rollout.group_size=0", r"^rollout\.group_size: 0 given; allowed: int >= 2"),
        ("rollout.group_size=2.5", r"^rollout\.group_size: 2\.5 given; allowed: int >= 2"),
        (
            "rlvr.loss=ppo",
            r'^rlvr\.loss: \'ppo\' given; allowed: "clip" \| "gspo" \| "cispo"; the default is \'clip\'',
        ),
        ("rlvr.dual_clip=0.5", r"allowed: float > 1 or null"),
        ("adapter.targets=[q_proj,w_proj]", r"^adapter\.targets\[1\]: 'w_proj' given"),
        ("optimizer.betas=[0.9]", r"^optimizer\.betas"),
        ("rollout.temperature.x=1", r"rollout\.temperature is a single value"),
        ("experts.text.task_args.level.deep=1", r"'level' is 1; it has no parts"),
        ("rollout.top_p=0.9", r"^rollout\.top_p: 0\.9; training requires 1\.0"),
        ("exchange.hub=sound", r"^exchange\.hub: 'sound' is no expert"),
        ("experts={}", r"^experts: empty"),
        ("model=3", r"^model: 3 given; .*set its fields"),
        ("experts.text=3", r"^experts\.text: 3 given; .*set its fields"),
        ("seed", r"allowed: section\.field=value"),
        ("=3", r"allowed: section\.field=value"),
    ],
)
def test_refused_in_one_line(config, override, message):
    with pytest.raises(UserError, match=message) as caught:
        apply_overrides(config, [override])
    assert "\n" not in str(caught.value)


def test_more_than_one_problem_is_counted(config):
    with pytest.raises(UserError, match=r"\(and 1 more\)"):
        apply_overrides(config, ["rollout.group_size=0", "rollout.temperature=-1"])


@settings(deadline=None, max_examples=50)
@given(st.text(alphabet="abcxyz", min_size=1, max_size=8), st.text(max_size=20))
def test_any_unknown_key_is_a_user_error(key, text):
    config = RunConfig(model=ModelConfig(path="/b"), experts={"text": ExpertConfig(task="a:B")})
    with pytest.raises(UserError):
        apply_overrides(config, [f"rlvr.{key}={text}"])


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_some_value(text):
    parse_value(text, None)
