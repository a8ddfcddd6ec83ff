#!/usr/bin/env bash
# One expert by GRPO with LoRA rank 32 on 8 H100:
#     VERL=~/verl DATA=$PWD/data/peers/verl BASE=$PWD/backbones/qwen3-vl-4b-instruct bash grpo.sh text|image|video
# 60 steps, as many RLVR steps as an expert takes in examples/qwen3_vl_4b_one_node.py (20 cycles of 3).
set -euo pipefail
STAGE=${1:?text, image or video}
source "$(dirname "$0")/common.sh"

cd "$VERL"
python3 -m verl.trainer.main_ppo "${COMMON[@]}" \
    "data.train_files=['$DATA/${STAGE}_train.parquet']" \
    "data.val_files=['$DATA/${STAGE}_test.parquet']" \
    trainer.n_gpus_per_node=8 \
    trainer.total_training_steps=60 \
    trainer.save_freq=60 \
    "${@:2}"
# verl's teachers are whole models: the adapter is merged into the backbone.
python3 -m verl.model_merger merge --backend fsdp \
    --local_dir "$SAVES/$STAGE/global_step_60/actor" --target_dir "$SAVES/$STAGE/lora"
python3 "$ROOT/tools/convert_checkpoint.py" merge --backbone "$BASE" \
    --adapters "$SAVES/$STAGE/lora/lora_adapter" --out "$SAVES/$STAGE/merged"
