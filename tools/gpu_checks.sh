#!/usr/bin/env bash
# Everything that only a GPU can show, with one command:  tools/gpu_checks.sh [item ...]     (default: all)
#
#   1 environment   copd doctor; FP8 rows
#   2 tests         those marked gpu; tools/run_tests.sh runs the CPU's suite as well, which takes long
#   3 prefix        an update with shared prefixes against naive ones, scoring by three experts, Qwen3-4B's shape
#   4 kernels       each Triton kernel: agreement, time, share of the roofline
#   5 fp8           FP8 against bfloat16: scoring and update by three experts, Qwen3-4B's shape
#   6 rollout       tokens per second of the embedded engine, a Qwen3-4B-shaped backbone, three experts
#   7 recipe        the SmolLM2 recipe with three skills
#   8 step          where a step's time goes
#   9 losses        losses over the vocabulary against kept logits and Liger-Kernel
#
# Kernels append to kernels/benchmarks/results/*.csv, all else writes to $OUT (runs/gpu_checks). An item that fails does
# not stop the others; the table at the end says which did, and the exit status is the number of failures.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
OUT="${OUT:-runs/gpu_checks}"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
NAMES=(environment tests prefix kernels fp8 rollout recipe step losses)
KERNELS=(prefix_attention vocab_topk topk_kl linear_logprob grouped_lora rowwise_fp8)
QWEN3_4B=(--layers 36 --hidden 2560 --heads 32 --kv-heads 8 --head-dim 128 --ffn 9728 --vocab 151936 --rank 32
          --dtype bfloat16)
LENGTHS=(--prefix 4096 --completion 1024 --group 8 --scope completion)

items=("$@")
[ ${#items[@]} -gt 0 ] || items=(1 2 3 4 5 6 7 8 9)
for item in "${items[@]}"; do
    [[ "$item" =~ ^[1-9]$ ]] || { echo "error: gpu_checks: $item; items are 1 to 9; see the top of tools/gpu_checks.sh" >&2; exit 2; }
done
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: gpu_checks: no CUDA device for $PYTHON; a GPU is needed; kernels/benchmarks/NAME.py --check runs without" >&2
    exit 2
}
mkdir -p "$OUT"

tool() {  # name of a tool and its arguments
    [ -f "tools/$1" ] || { echo "tools/$1 is not in this checkout" >&2; return 1; }
    "$PYTHON" "tools/$1" "${@:2}"
}
each_kernel() {
    local failed=0
    for kernel in "$@"; do "$PYTHON" "kernels/benchmarks/$kernel.py" || failed=1; done
    return $failed
}

item_1() { "$PYTHON" -m copd_megatron doctor && each_kernel rowwise_fp8; }
item_2() { "$PYTHON" -m pytest -q -m gpu; }
item_3() {
    local failed=0
    for attention in flash triton; do
        tool bench_scoring.py "${QWEN3_4B[@]}" "${LENGTHS[@]}" --attention "$attention" \
            --json "$OUT/scoring_$attention.json" || failed=1
    done
    for experts in 1 3; do
        tool bench_update.py "${QWEN3_4B[@]}" "${LENGTHS[@]}" --experts "$experts" --max-tokens 10240 --repeats 2 \
            --json "$OUT/update_4096_1024_$experts.json" || failed=1
    done
    # Activations of 33,000 rows do not fit, so that each layer is computed again in the backward.
    tool bench_update.py "${QWEN3_4B[@]}" --prefix 1024 --completion 8192 --group 4 --experts 3 --scope completion \
        --first-layer 18 --recompute full --max-tokens 10240 --repeats 1 \
        --json "$OUT/update_1024_8192_3.json" || failed=1
    return $failed
}
item_4() { each_kernel "${KERNELS[@]}"; }
item_5() { tool bench_fp8.py "${QWEN3_4B[@]}" "${LENGTHS[@]}" --json "$OUT/fp8.json"; }
item_6() {
    tool bench_rollout.py "${QWEN3_4B[@]}" --prefix 4096 --completion 128 --batch 8 64 --json "$OUT/rollout.json"
}
item_7() { tool smollm2_study.py --json "$OUT/smollm2.json"; }
item_8() { tool profile_step.py examples/quickstart.py --json "$OUT/step.json"; }
item_9() {
    tool bench_losses.py --loss jsd topk logprob --tokens 8192 --hidden 4096 --vocab 128256 --dtype bfloat16 \
        --json "$OUT/losses.json"
}

failures=0 table=""
for item in "${items[@]}"; do
    echo "== $item ${NAMES[item - 1]}"
    SECONDS=0
    if "item_$item"; then result=passed; else result=failed; failures=$((failures + 1)); fi
    table+=$(printf '%s %-12s %s %5d s' "$item" "${NAMES[item - 1]}" "$result" "$SECONDS")$'\n'
done
printf '\n%s' "$table"
echo "written: $OUT, kernels/benchmarks/results"
exit "$failures"
