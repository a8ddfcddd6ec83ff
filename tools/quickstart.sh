#!/usr/bin/env bash
# From a bare clone to three experts that taught each other: installs, trains examples/quickstart.py, shows the result.
#
#   bash tools/quickstart.sh                      train into runs/quickstart, or show the run that is there
#   bash tools/quickstart.sh --anew               put the old run aside and train again
#   bash tools/quickstart.sh --set seed=1 --run-dir runs/seed1      other arguments go to `copd train`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run_dir=runs/quickstart
anew=no
arguments=()
while [ $# -gt 0 ]; do
    case "$1" in
        --anew) anew=yes ;;
        --run-dir) run_dir="${2:?--run-dir needs a folder}"; shift ;;
        --run-dir=*) run_dir="${1#*=}" ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

bash tools/setup_env.sh

if [ "$anew" = yes ] && [ -e "$run_dir" ]; then
    aside="$run_dir.$(date +%Y%m%d-%H%M%S)"
    mv "$run_dir" "$aside"
    echo "The old run is now $aside."
fi
if [ -f "$run_dir/summary.json" ]; then
    .venv/bin/copd report "$run_dir"
    echo "$run_dir is complete; to train again: bash tools/quickstart.sh --anew"
    exit 0
fi
# A run that was stopped goes on from its last save.
if [ -n "$(ls "$run_dir/checkpoints" 2>/dev/null)" ]; then
    arguments+=(--resume)
fi
exec .venv/bin/copd train examples/quickstart.py --run-dir "$run_dir" "${arguments[@]}"
