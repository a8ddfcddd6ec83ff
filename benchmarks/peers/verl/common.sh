# What both stages share; sourced by grpo.sh and mopd.sh. Written against verl 1dda039b9c6311889a9c9a26040677e1254814f9.
# Sizes are those of examples/qwen3_vl_4b_one_node.py.
: "${VERL:?path of the verl checkout}" "${DATA:?absolute path of the folder verl that export.py wrote}"
: "${BASE:?local directory of Qwen3-VL-4B-Instruct}"
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../../.." && pwd)
LOGS=${LOGS:-$PWD/logs/verl}
SAVES=${SAVES:-$PWD/checkpoints/verl}
PROMPT=4096
ANSWER=2048
mkdir -p "$LOGS"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export VERL_FILE_LOGGER_PATH="$LOGS/$STAGE.jsonl"

COMMON=(
    algorithm.adv_estimator=grpo
    algorithm.use_kl_in_reward=False
    data.train_batch_size=64
    data.max_prompt_length=$PROMPT
    data.max_response_length=$ANSWER
    data.filter_overlong_prompts=True
    data.truncation=error
    data.image_key=images
    data.video_key=videos
    data.seed=0
    actor_rollout_ref.model.path="$BASE"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.enable_gradient_checkpointing=True
    actor_rollout_ref.model.lora_rank=32
    actor_rollout_ref.model.lora_alpha=32
    actor_rollout_ref.model.target_modules=all-linear
    "actor_rollout_ref.model.exclude_modules='.*visual.*'"
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.optim.lr=2e-5
    actor_rollout_ref.actor.optim.lr_warmup_steps=10
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
    actor_rollout_ref.actor.use_kl_loss=False
    actor_rollout_ref.actor.entropy_coeff=0
    actor_rollout_ref.actor.clip_ratio_low=0.2
    actor_rollout_ref.actor.clip_ratio_high=0.28
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.load_format=safetensors
    actor_rollout_ref.rollout.tensor_model_parallel_size=1
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.max_model_len=$((PROMPT + ANSWER + 1))
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384
    actor_rollout_ref.rollout.val_kwargs.do_sample=False
    actor_rollout_ref.rollout.val_kwargs.n=1
    reward.custom_reward_function.path="$HERE/reward.py"
    reward.custom_reward_function.name=compute_score
    trainer.project_name=copd_peers
    trainer.experiment_name="$STAGE"
    trainer.default_local_dir="$SAVES/$STAGE"
    'trainer.logger=["console","file"]'
    trainer.nnodes=1
    trainer.total_epochs=1000  # the steps of each stage end it
    trainer.val_before_train=False
    trainer.test_freq=25
)
