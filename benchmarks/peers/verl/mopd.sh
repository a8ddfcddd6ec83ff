#!/usr/bin/env bash
# Multi-teacher on-policy distillation of the three experts into one policy, on the same 8 H100:
#     VERL=~/verl DATA=$PWD/data/peers/verl BASE=$PWD/backbones/qwen3-vl-4b-instruct bash mopd.sh
# Teachers have GPUs of their own in verl: 3 serve one teacher each, 4 train and roll out (batches must divide), 1 is
# left over. The table charges all 8. Routed by data_source; the top-k signal is verl's forward KL without a tail.
set -euo pipefail
STAGE=mopd
source "$(dirname "$0")/common.sh"

teacher() {  # name
    echo "+distillation.teacher_models.$1.key=$1" \
        "+distillation.teacher_models.$1.model_path=$SAVES/$1/merged" \
        "+distillation.teacher_models.$1.num_replicas=1" \
        "+distillation.teacher_models.$1.inference.name=vllm" \
        "+distillation.teacher_models.$1.inference.tensor_model_parallel_size=1" \
        "+distillation.teacher_models.$1.inference.gpu_memory_utilization=0.8" \
        "+distillation.teacher_models.$1.inference.max_model_len=$((PROMPT + ANSWER + 1))"
}

cd "$VERL"
# shellcheck disable=SC2046  (a teacher is several words)
python3 -m verl.trainer.main_ppo "${COMMON[@]}" \
    "data.train_files=['$DATA/text_train.parquet','$DATA/image_train.parquet','$DATA/video_train.parquet']" \
    "data.val_files=['$DATA/text_test.parquet','$DATA/image_test.parquet','$DATA/video_test.parquet']" \
    data.shuffle=True \
    distillation.enabled=True \
    distillation.teacher_key=data_source \
    distillation.n_gpus_per_node=3 \
    distillation.nnodes=1 \
    $(teacher text) $(teacher image) $(teacher video) \
    distillation.distillation_loss.loss_mode=forward_kl_topk \
    distillation.distillation_loss.topk=64 \
    distillation.distillation_loss.use_task_rewards=False \
    distillation.distillation_loss.use_policy_gradient=False \
    trainer.n_gpus_per_node=4 \
    trainer.total_training_steps="${STEPS:-100}" \
    trainer.save_freq=100 \
    "$@"
