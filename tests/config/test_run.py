"""What fits field by field but not together is refused in one line when a run is resolved."""
import pytest

from copd_megatron.config.loading import apply_overrides, load_recipe
from copd_megatron.config.model import ModelConfig
from copd_megatron.config.run import RunConfig
from copd_megatron.config.tasks import ExpertConfig
from copd_megatron.types import UserError


def run(*experts: str, **sections) -> RunConfig:
    names = experts or ("text", "image")
    return RunConfig(model=ModelConfig(path="/b"), experts={e: ExpertConfig(task="a:B") for e in names}, **sections)


@pytest.mark.parametrize(("overrides", "message"), [
    (["rollout.top_p=0.9"], r"^rollout\.top_p: 0\.9; training requires 1\.0"),
    (["rollout.prefix_store_bytes=9", "model.prefix_sharing=false"],
     r"^rollout\.prefix_store_bytes: 9 with model\.prefix_sharing=false, which .*; set one of the two"),
    (["rollout.prefix_store_bytes=9", "model.fp8=te_current"],
     r"^rollout\.prefix_store_bytes: 9 with model\.fp8=te_current, whose .*model\.fp8=te_blockwise or frozen_rowwise"),
    (["model.fp8=te_blockwise", "model.dtype=float32"],
     r"^model\.fp8: te_blockwise with model\.dtype=float32; bfloat16 is allowed; set model\.dtype=bfloat16"),
    (["rollout.prefix_store_bytes=9", "parallel.context=2", "parallel.moe_expert=2"],
     r"^rollout\.prefix_store_bytes: 9 with MoE experts spread over parallel\.context=2 ranks, .*parallel\.context=1"),
    (["rollout.lower_states_bytes=9"],
     r"^rollout\.lower_states_bytes: 9 with adapter\.first_layer=0, below .*, or adapter\.first_layer above 0"),
    (["rollout.lower_states_bytes=9", "adapter.first_layer=1", "model.prefix_sharing=false"],
     r"^rollout\.lower_states_bytes: 9 with model\.prefix_sharing=false, which .*; set one of the two"),
    (["rollout.lower_states_bytes=9", "adapter.first_layer=1", "model.fp8=te_current"],
     r"^rollout\.lower_states_bytes: 9 with model\.fp8=te_current, whose .*model\.fp8=te_blockwise or frozen_rowwise"),
    (["rlvr.dual_clip=3", "rlvr.loss=cispo"], r"^rlvr\.dual_clip: 3\.0 with rlvr\.loss=cispo"),
    (["rlvr.overlong_buffer_tokens=65", "rollout.max_completion_tokens=64"],
     r"^rlvr\.overlong_buffer_tokens: 65; at most rollout\.max_completion_tokens, 64"),
    (["rlvr.minibatches_per_rollout=5", "rollout.prompts_per_step=4"],
     r"^rlvr\.minibatches_per_rollout: 5; at most rollout\.prompts_per_step, 4"),
    (["schedule.rl_steps=0", "schedule.opd_steps=0"], r"^schedule\.rl_steps and schedule\.opd_steps: both are 0"),
    (["evaluation.samples=2"], r"^evaluation\.samples: .*set evaluation\.greedy=false"),
    (["exchange.hub=video"], r"^exchange\.hub: 'video' is no expert; experts are \['image', 'text'\]"),
    (["experts={}"], r"^experts: empty"),
    (["merge.rule=weighted", 'merge.weights={"text": 1}'],
     r"^merge\.weights: .*one weight for each of the experts text, image and no other"),
    (['schedule.rl_steps_of={"imgae": 1}'],
     r"^schedule\.rl_steps_of: 'imgae' is no expert; experts are text, image; nearest: image"),
    (["schedule.enter_overlap=0.9", "schedule.leave_overlap=0.8"],
     r"^schedule\.enter_overlap: 0\.9; at most schedule\.leave_overlap, 0\.8"),
    (["schedule.kind=adaptive", "schedule.rl_steps=0"], r"^schedule\.rl_steps: 0 with schedule\.kind=adaptive"),
    (["schedule.rl_length=[3,2]"], r"^schedule\.rl_length: \[3, 2\]; the least comes first"),
    (['exchange.frozen_teachers={"text": "/a"}'], r"^exchange\.frozen_teachers: 'text'; a name has letters"),
    (['exchange.frozen_teachers={"backbone": "/a"}'], r"^exchange\.frozen_teachers: 'backbone'; a name"),
    (['exchange.frozen_teachers={"a/b": "/a"}'], r"^exchange\.frozen_teachers: 'a/b'; a name"),
])
def test_sections_that_do_not_fit(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        apply_overrides(run(), overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", [
    ["rlvr.dual_clip=3"], ["rlvr.loss=cispo"],
    ["rlvr.overlong_buffer_tokens=64", "rollout.max_completion_tokens=64"],
    ["rlvr.minibatches_per_rollout=4", "rollout.prompts_per_step=4"],
    ["schedule.rl_steps=0"], ["schedule.opd_steps=0"],
    ['schedule.rl_steps_of={"image": 0}'], ["schedule.enter_overlap=0.8", "schedule.leave_overlap=0.8"],
    ["schedule.rl_length=[2,2]"], ['exchange.frozen_teachers={"old": "/a"}'],
    ["merge.rule=weighted", 'merge.weights={"text": 1, "image": -0.5}'], ["merge.rule=concat"],
    ["evaluation.samples=2", "evaluation.greedy=false"], ["exchange.hub=image"],
    ["rollout.lower_states_bytes=9", "adapter.first_layer=1", "model.fp8=frozen_rowwise"]])
def test_their_neighbours_fit(overrides):
    apply_overrides(run(), overrides)


@pytest.mark.parametrize("name", ["base", "merged", "kl_reference", "edge", "a/b", "a->b", "a~b", "a.b", "", "../x"])
def test_an_expert_name_stays_apart_in_metrics_and_folders(name):
    with pytest.raises(ValueError, match="experts: "):
        run("text", name)


def test_a_recipe_cannot_slip_past_the_checks(tmp_path):
    file = tmp_path / "sly_recipe.py"
    file.write_text("from copd_megatron.config.model import ModelConfig\n"
                    "from copd_megatron.config.run import RunConfig\n"
                    "from copd_megatron.config.tasks import ExpertConfig\n"
                    "def recipe():\n"
                    "    run = RunConfig(model=ModelConfig(path='b'), experts={'text': ExpertConfig(task='a:B')})\n"
                    "    run.rollout.top_p = 0.5\n"
                    "    return run\n")
    with pytest.raises(UserError, match=r"^rollout\.top_p: 0\.5"):
        load_recipe(file)
