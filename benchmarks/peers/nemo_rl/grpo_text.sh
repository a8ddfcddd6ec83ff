#!/usr/bin/env bash
# NEMO_RL=~/RL DATA=$PWD/data/peers/nemo_rl BASE=$PWD/backbones/qwen3-vl-4b-instruct LOGS=$PWD/logs/nemo_rl bash grpo_text.sh
set -euo pipefail
: "${NEMO_RL:?path of the NeMo-RL checkout}" "${DATA:?absolute path of the folder nemo_rl that export.py wrote}"
: "${BASE:?local directory of Qwen3-VL-4B-Instruct}" "${LOGS:?absolute path for logs}"
export DATA BASE LOGS
cp "$(dirname "$0")/grpo_text.yaml" "$NEMO_RL/examples/configs/copd_peers_text.yaml"
cd "$NEMO_RL"
uv run examples/run_grpo.py --config examples/configs/copd_peers_text.yaml "$@"
